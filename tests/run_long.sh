#!/usr/bin/env bash
# What takes too long for every change, on the CPU: each recipe from its beginning to its end in its --smoke form, and the
# tests that are marked long.
#
#     bash tests/run_long.sh            # all: a minute or so of processor time a row
#     bash tests/run_long.sh small      # only the recipes whose name contains this
#     bash tests/run_long.sh wmt14      # those of translation: wmt14-ROW, and multi30k
#
# TEXT=folder holds train.txt, valid.txt and test.txt, PAIRS=folder the same of .en and .de (default: made of this repository's
# documents, the German side being the words of a line in reverse). Takes the .venv of tests/run.sh, or VENV=folder.
# Failures are named at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
recipes=examples/language_model
translation=examples/translation
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

pairs=${PAIRS:-$work/pairs}
if [ -z "${PAIRS:-}" ]; then
    mkdir "$pairs"
    for split in train valid test; do
        # not with head, which would break the pipe of a long text
        awk 'NF && ++n <= 300 { if (NF > 30) NF = 30; $1 = $1; print }' "$text/$split.txt" > "$pairs/$split.en"
        awk '{ for (i = NF; i > 1; i--) printf "%s ", $i; print $1 }' "$pairs/$split.en" > "$pairs/$split.de"
    done
fi
# by the names that Multi30k has
mkdir "$work/multi30k-text"
for language in en de; do
    cp "$pairs/train.$language" "$work/multi30k-text/train.$language"
    cp "$pairs/valid.$language" "$work/multi30k-text/val.$language"
    cp "$pairs/test.$language" "$work/multi30k-text/test_2016_flickr.$language"
done

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
multi30k() {
    bash "$translation/compare_multi30k.sh" --smoke "$work/multi30k-text" && bash "$translation/convert_multi30k.sh"
}
WORK=$work/multi30k RESULTS='' smoke multi30k multi30k
for row in $(sed -n 's/^| `\([a-z0-9-]*\)` |.*/\1/p' "$translation/WMT14.md"); do
    WORK=$work/wmt14 smoke "wmt14-$row" bash "$translation/train_wmt14.sh" --smoke "$pairs" "$row"
    rm -rf "$work/wmt14/models"
done
if [ -z "$wanted" ]; then
    python -m pytest -q -m long tests || failed+=("pytest -m long")
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "tests/run_long.sh: failed: ${failed[*]}" >&2
    exit 1
fi
