#!/usr/bin/env bash
# Converts the softmax model of compare_multi30k.sh to the delta rule, with distillation and without: BLEU into README.md.
#
#     bash examples/translation/convert_multi30k.sh      # after compare_multi30k.sh, or after its row ROWS=softmax
#
# The two commands are those that fastweights-convert prints, a tenth of the softmax model's updates each; without
# distillation the second one has both tenths. Stopped, it goes on with the step at which it was. Environment: WORK and
# RESULTS as for compare_multi30k.sh; ATTENTION, the flags of fastweights-convert.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
work=$(realpath -m "${WORK:-$here/multi30k}")
attention=${ATTENTION:---update-rule delta --feature-map elu}
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts
softmax="$work/runs/softmax,seed=1"
out=$work/converted
[ -f "$softmax/evaluate.finished" ] || { echo "convert_multi30k.sh: there is no finished $softmax: run compare_multi30k.sh first" >&2; exit 1; }
mkdir -p "$out"
made_of="$attention $(cksum < "$softmax/checkpoint_best.pt")"
[ -e "$out/made-of" ] || echo "$made_of" > "$out/made-of"
[ "$(cat "$out/made-of")" = "$made_of" ] || { echo "convert_multi30k.sh: $out is of another model or other flags: remove it" >&2; exit 1; }

# step NAME COMMAND: once; what it prints goes to NAME.log
step() {
    local name=$1 started=$SECONDS
    if [ -f "$out/$name.finished" ]; then return; fi
    "${@:2}" > "$out/$name.log" 2>&1 || { echo "$name failed:"; tail -n 15 "$out/$name.log"; exit 1; } >&2
    echo "$((SECONDS - started))" > "$out/$name.finished"
    echo "$name: $((SECONDS - started)) s"
}

# printed N FLAGS: the Nth command that fastweights-convert has printed, with these flags after it
printed() {
    local command
    command=$(grep '^fairseq-train ' "$out/as-converted.log" | sed -n "$1p")
    set -- --seed 1 --num-workers 0 --required-batch-size-multiple 1 --no-epoch-checkpoints --no-progress-bar \
        --distributed-world-size 1 "${@:2}"
    eval "$command $(printf ' %q' "$@")"
}

# shellcheck disable=SC2086 # attention is words
step as-converted fastweights-convert "$softmax/checkpoint_best.pt" "$out/as-converted.pt" $attention
step distilled printed 1
step distilled,trained printed 2
tenth=$(grep -o -m 1 'max-update [0-9]*' "$out/as-converted.log" | cut -d ' ' -f 2)
step trained printed 2 --finetune-from-model "$out/as-converted.pt" --max-update $((2 * tenth)) --save-dir "$out/trained"

evaluated() { step "$1-evaluated" python "$here/evaluate.py" "$2" "$work/data" --out "$out/$1"; }
evaluated as-converted "$out/as-converted.pt"
evaluated distilled "$out/as-converted-distilled/checkpoint_best.pt"
evaluated distilled,trained "$out/as-converted-trained/checkpoint_best.pt"
evaluated trained "$out/trained/checkpoint_best.pt"
if [ "${RESULTS-x}" != '' ]; then
    python "$here/conversion_results.py" "$work" --into "${RESULTS:-$here}"
fi
