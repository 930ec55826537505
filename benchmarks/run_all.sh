#!/usr/bin/env bash
# All benchmarks and the table of targets, into benchmarks/README.md. About 20 minutes; nothing else may run.
#
#     bash benchmarks/run_all.sh
#
# PYTHON=.venv/bin/python chooses the interpreter; the default is the tests' virtual environment if there is one.
set -euo pipefail
cd "$(dirname "$0")"
venv=$PWD/../.venv/bin/python
python=${PYTHON:-$([ -x "$venv" ] && echo "$venv" || echo python3)}
export OMP_NUM_THREADS=2
started=$SECONDS
for script in "attention.py --readme" training.py decoding.py startup.py; do
    echo "== $script ($((SECONDS - started)) s so far)"
    # fairseq logs and warns on stderr; show it only where a script fails
    log=$(mktemp)
    $python $script --json "${script%.py*}.json" 2> "$log" || { tail -30 "$log" >&2; exit 1; }
    rm "$log"
done
echo "== targets"
$python targets.py --readme
echo "== done in $((SECONDS - started)) s"
