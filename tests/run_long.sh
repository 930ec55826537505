#!/usr/bin/env bash
# What takes too long for every change: each recipe from its beginning to its end in its --smoke form, on the CPU.
#
#     bash tests/run_long.sh            # all: a minute or so of processor time a row
#     bash tests/run_long.sh small      # only the rows whose name contains this
#
# TEXT=folder holds train.txt, valid.txt and test.txt (default: made of this repository's documents). Takes the .venv of
# tests/run.sh, or VENV=folder. A row that this version cannot run yet fails like any other; failures are named at the end.
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
for row in $(sed -n '/| published |/!s/^| `\([a-z0-9-]*\)` |.*/\1/p' "$recipes/WIKITEXT103.md"); do
    [[ $row == *"$wanted"* ]] || continue
    started=$SECONDS
    if WORK=$work/recipes bash "$recipes/train_wikitext103.sh" --smoke "$text" "$row" > "$work/log" 2>&1; then
        echo "$row: $((SECONDS - started)) s, $(tail -n 1 "$work/log")"
    else
        echo "$row: FAILED"
        sed 's/^/    /' "$work/log" | tail -n 15
        failed+=("$row")
    fi
    rm -rf "$work/recipes/models"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "tests/run_long.sh: failed: ${failed[*]}" >&2
    exit 1
fi
