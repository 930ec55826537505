#!/usr/bin/env bash
# What takes too long for every change, on the CPU: each recipe from its beginning to its end in its --smoke form, and the
# tests that are marked long.
#
#     bash tests/run_long.sh            # all: a minute or so of processor time a row
#     bash tests/run_long.sh small      # only the recipes whose name contains this
#
# TEXT=folder holds train.txt, valid.txt and test.txt (default: made of this repository's documents). Takes the .venv of
# tests/run.sh, or VENV=folder. Failures are named at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
recipes=examples/language_model
wanted=${1:-}
[ -x "$venv/bin/fairseq-train" ] || { echo "tests/run_long.sh: no fairseq in $venv: run tests/run.sh first" >&2; exit 1; }

export PATH=$(cd "$venv/bin" && pwd):$PATH GPUS=0 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

text=${TEXT:-$work/text}
if [ -z "${TEXT:-}" ]; then
    mkdir "$text"
    cat README.md "$recipes/WIKITEXT103.md" > "$text/train.txt"
    cp CONTRIBUTING.md "$text/valid.txt"
    cp CHANGELOG.md "$text/test.txt"
fi

failed=()

# smoke NAME COMMAND ...: run it if it is wanted
smoke() {
    local name=$1 started=$SECONDS
    [[ $name == *"$wanted"* ]] || return 0
    if "${@:2}" > "$work/log" 2>&1; then
        echo "$name: $((SECONDS - started)) s, $(tail -n 1 "$work/log")"
    else
        echo "$name: FAILED"
        sed 's/^/    /' "$work/log" | tail -n 15
        failed+=("$name")
    fi
}

WORK=$work/wikitext2 RESULTS='' smoke wikitext2 bash "$recipes/compare_wikitext2.sh" --smoke "$text"
for row in $(sed -n '/| published |/!s/^| `\([a-z0-9-]*\)` |.*/\1/p' "$recipes/WIKITEXT103.md"); do
    WORK=$work/recipes smoke "$row" bash "$recipes/train_wikitext103.sh" --smoke "$text" "$row"
    rm -rf "$work/recipes/models"
done
if [ -z "$wanted" ]; then
    python -m pytest -q -m long tests || failed+=("pytest -m long")
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "tests/run_long.sh: failed: ${failed[*]}" >&2
    exit 1
fi
