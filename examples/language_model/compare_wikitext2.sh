#!/usr/bin/env bash
# Compares attentions on WikiText-2: the rows of wikitext2.yaml, their perplexities, table and curves into README.md.
#
#     bash examples/language_model/compare_wikitext2.sh             # downloads the text
#     bash examples/language_model/compare_wikitext2.sh FOLDER      # of train.txt, valid.txt, test.txt
#     bash examples/language_model/compare_wikitext2.sh --smoke FOLDER   # two updates of three rows on a little of it
#
# It needs the extras compare and examples. Stopped, it goes on where it was, row by row. Environment: WORK, the folder
# of data and runs (default: examples/language_model/wikitext2); JOBS, rows at a time (1); ROWS, the names of some rows;
# UPDATES, how many of each, to see how fast they are; RESULTS, the folder of the README.md into which the results go
# (default: this one; with --smoke or UPDATES none).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
smoke=
if [ "${1:-}" = --smoke ]; then smoke=--smoke; shift; fi
work=$(realpath -m "${WORK:-$here/wikitext2${smoke:+-smoke}${UPDATES:+-$UPDATES}}")
text=$(realpath -m "${1:-$work/text}")
results=$(realpath -m "${RESULTS:-$here}")
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts
mkdir -p "$work"

say() { printf '\n== %s\n' "$*"; }

say "Text"
[ $# -gt 0 ] || bash "$here/prepare_wikitext2.sh" "$text"
if [ -n "$smoke" ]; then
    mkdir -p "$work/little"
    for split in train valid test; do head -n 100 "$text/$split.txt" > "$work/little/$split.txt"; done
    text=$work/little
    export VOCAB=${VOCAB:-300} ROWS=${ROWS:-softmax delta+elu delta+elu,carried}
fi
bash "$here/prepare_text.sh" "$text" "$work/data"

source "$root/examples/compare/run_rows.sh"
run_rows "$here/wikitext2.yaml"
if [ -z "$smoke${UPDATES:-}" ] || [ -n "${RESULTS:-}" ]; then
    say "Carried and not"
    python "$here/carried.py" "$work" --into "$results"
fi
