#!/usr/bin/env bash
# Everything a change must pass: lint, format, all tests. Sets up .venv on the first run (about 2 minutes).
#
#     bash tests/run.sh                        # all
#     bash tests/run.sh tests/ops -k gradcheck # arguments go to pytest
#
# PYTHON=python3.12 chooses the interpreter of a new .venv, VENV=folder another place for it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    echo "tests/run.sh: no Python 3.10 to 3.12 found; set PYTHON" >&2
    exit 1
}

# done means: installed from these very files, to the end
stamp=$venv/installed-for-tests
wanted=$(cat setup.py constraints.txt | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "== setting up $venv"
    if [ ! -x "$venv/bin/pip" ]; then
        python=$(find_python)
        "$python" -m venv "$venv" || { echo "tests/run.sh: no virtual environment: apt-get install python3-venv" >&2; exit 1; }
    fi
    "$venv/bin/pip" install -q -c constraints.txt torch
    "$venv/bin/pip" install -q -c constraints.txt -e '.[fairseq,test]'
    echo "$wanted" > "$stamp"
fi

echo "== ruff"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
echo "== pytest"
# one thread a worker: two threads that wait for each other on a busy core take many times longer
NO_SKIPS=1 OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -q -n "${WORKERS:-2}" --dist loadgroup "$@"
