#!/usr/bin/env bash
# Compares attentions on Multi30k English-German: the rows of multi30k.yaml, their BLEU, table and plots into README.md.
#
#     bash examples/translation/compare_multi30k.sh             # downloads the text
#     bash examples/translation/compare_multi30k.sh FOLDER      # of train.en, val.en, test_2016_flickr.en and the same in .de
#     bash examples/translation/compare_multi30k.sh --smoke FOLDER   # two updates of three rows on a little of it
#
# It needs the extra examples. Stopped, it goes on where it was, row by row. Environment: WORK, the folder of data and
# runs (default: examples/translation/multi30k); JOBS, rows at a time (1); ROWS, the names of some rows; UPDATES, how
# many of each, to see how fast they are; RESULTS, the folder of the README.md into which the results go (default: this
# one; with --smoke or UPDATES none).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
smoke=
if [ "${1:-}" = --smoke ]; then smoke=--smoke; shift; fi
work=$(realpath -m "${WORK:-$here/multi30k${smoke:+-smoke}${UPDATES:+-$UPDATES}}")
text=${1:+$(realpath -m "$1")}
results=$(realpath -m "${RESULTS:-$here}")
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts
mkdir -p "$work"

say() { printf '\n== %s\n' "$*"; }

say "Text"
if [ -n "$smoke" ]; then
    mkdir -p "$work/little"
    for name in {train,val,test_2016_flickr}.{en,de}; do
        lines=10
        [[ $name != train* ]] || lines=200
        head -n "$lines" "$text/$name" > "$work/little/$name"
    done
    text=$work/little
    export VOCAB=${VOCAB:-300} ROWS=${ROWS:-softmax delta+elu delta+elu,everywhere}
fi
# the grid takes a joint sentencepiece model
PIECES=sentencepiece CLEAN='' SENTENCES=0 bash "$here/prepare_multi30k.sh" "$work/data" ${text:+"$text"}
source "$root/examples/compare/run_rows.sh"
run_rows "$here/multi30k.yaml"
