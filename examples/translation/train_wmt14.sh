#!/usr/bin/env bash
# One row of the WMT14 En-De table: trains the model, translates newstest2013 and newstest2014, prints both BLEU.
#
#     bash examples/translation/train_wmt14.sh ROW                  # ROW: a name in WMT14.md
#     bash examples/translation/train_wmt14.sh ROW --lr 7e-4        # further flags go to fairseq-train
#     bash examples/translation/train_wmt14.sh --print ROW          # the fairseq-train command alone
#     bash examples/translation/train_wmt14.sh --smoke PAIRS ROW    # 3 updates on a folder of pairs, no download
#
# prepare_wmt14_en_de.sh runs first where the data is missing. Running it again continues.
# GPUS=8 (of this machine; default: all there are, 0: the CPU) and TOKENS=3584 (of a GPU and step; a divisor of 172032) share
# out the batch, which stays that of the paper: 172,032 tokens an update. Several machines: MACHINES=2 MACHINE=0
# MASTER=address:port, the same on each but MACHINE, which counts from 0; WORK must be a folder that all of them see.
# BEAM="4 5" and LENPEN="0.6 1.0": settings tried on newstest2013, the best is used on newstest2014. AVERAGE=5: evaluates the
# mean of the last five epochs, too. WORK=folder: data and models (default: examples/translation/wmt14, with --smoke
# its folder smoke). PIECES as for prepare_pairs.sh.
# The paper's models took three V100 and about four days each; none has been trained to the end here.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/examples/translation
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
batch=172032  # the paper's: 3584 tokens x 3 GPUs x 16 steps
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts

say() { printf '\n== %s\n' "$*"; }

fail() { printf 'train_wmt14: %s\n' "$*" >&2; exit 1; }

rows() { sed -n 's/^| `\([a-z0-9-]*\)` |.*/\1/p' "$here/WMT14.md"; }

# column N of the row's line: 2 attentions, 3 d_dot, 4 valid, 5 test, 6 flags
column() {
    grep -F "| \`$row\` |" "$here/WMT14.md" | awk -F '|' -v n="$(($1 + 1))" '{ gsub(/^ +| +$|`/, "", $n); print $n }'
}

# where each update's tokens are read: GPUs of this and other machines, and steps whose gradients are added up
share_out() {
    gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    machines=${MACHINES:-1} machine=${MACHINE:-0} tokens=${TOKENS:-3584}
    [ "$machine" -lt "$machines" ] || fail "MACHINE counts from 0 to MACHINES - 1, got $machine of $machines"
    [ "$gpus" -gt 0 ] || [ "$machines" = 1 ] || fail "several MACHINES need GPUs, got GPUS=0"
    world=$((machines * (gpus > 0 ? gpus : 1)))
    [ $((batch % (world * tokens))) = 0 ] \
        || fail "$batch tokens an update cannot be shared out over $world GPUs x steps of $tokens tokens (TOKENS)"
    steps=$((batch / world / tokens))
    device=(--fp16)
    if [ "$gpus" = 0 ]; then device=(--cpu); fi
    if [ "$machines" -gt 1 ]; then
        device+=(--distributed-init-method "tcp://${MASTER:?must be address:port of the first machine}"
            --distributed-rank $((machine * gpus)))
    fi
}

# how pieces become text again when BLEU is measured during the training
joining() {
    case ${PIECES:-sentencepiece} in
        sentencepiece) echo --eval-bleu-detok space --eval-bleu-remove-bpe sentencepiece ;;
        *) echo --eval-bleu-detok moses --eval-bleu-detok-args '{"source_lang":"en","target_lang":"de"}' --eval-bleu-remove-bpe ;;
    esac
}

settings() {
    length=(--max-epoch 45 --warmup-updates 4000 --keep-last-epochs 10)
    beam=${BEAM:-4} lenpen=${LENPEN:-0.6}
    if [ -n "$smoke" ]; then
        tokens=512 steps=1
        length=(--max-update 3 --warmup-updates 1 --encoder-layers 2 --decoder-layers 2
            --no-last-checkpoints --no-epoch-checkpoints --no-save-optimizer-state)
    fi
}

training_command() {
    # shellcheck disable=SC2046 # words
    command=(fairseq-train "$work/data/bin" --user-dir "$root/fairseq_fastweights" --save-dir "$model"
        --source-lang en --target-lang de
        --arch fast_weight_transformer_vaswani_wmt_en_de_big --share-all-embeddings --dropout 0.3 $(column 6)
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1
        --optimizer adam --adam-betas '(0.9,0.98)' --clip-norm 0 --weight-decay 0
        --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 "${length[@]}"
        --max-tokens "$tokens" --update-freq "$steps" --distributed-world-size "$world" "${device[@]}" --seed 1
        --required-batch-size-multiple 1
        --eval-bleu --eval-bleu-args '{"beam":4,"lenpen":0.6,"max_len_a":2,"max_len_b":10}' $(joining)
        --best-checkpoint-metric bleu --maximize-best-checkpoint-metric
        --log-format simple --log-interval 100 "$@")
}

train() {
    "${command[@]}" 2>&1 | tee -a "$model/train.log" | show_progress
}

show_progress() {
    sed -n -u -E \
        -e "s/.*nll_loss=([0-9.]+), ppl=([0-9.]+), wps=([0-9.]+).*num_updates=([0-9]+).*wall=([0-9]+).*/   update \4   perplexity \2   \3 tokens\/s   \5 s/p" \
        -e "s/.*valid on 'valid' subset.* ppl ([0-9.]+) .* bleu ([0-9.]+) .*/   validation perplexity \1, BLEU \2/p" \
        -e '/^[A-Za-z_.]*Error|error: /p'
}

# evaluate CHECKPOINT: its BLEU of both splits are the last lines of $model/CHECKPOINT.log that begin with BLEU
evaluate() {
    local extra=()
    if [ "$gpus" = 0 ]; then extra=(-- --cpu); else extra=(-- --fp16); fi
    # shellcheck disable=SC2086 # numbers
    python "$here/evaluate.py" "$model/$1.pt" "$work/data" --beam $beam --lenpen $lenpen "${extra[@]}" \
        > "$model/$1.log" 2>&1 || fail "the evaluation failed: see $model/$1.log"
}

# report CHECKPOINT
report() {
    python - "$model/$1-scores/scores.json" <<< '
import json, sys
scores = json.load(open(sys.argv[1]))
valid = max((one for one in scores if one["split"] == "valid"), key=lambda one: one["bleu"])
test = next(one for one in scores if one["split"] == "test")
for one in (valid, test):
    print(f"""   {one["split"]}, beam {one["beam"]}, length penalty {one["lenpen"]:g}: {one["bleu_line"]}; {one["chrf_line"]}""")
print(round(valid["bleu"], 1), round(test["bleu"], 1))' > "$model/$1.bleu"
    sed '$d' "$model/$1.bleu"
    read -r valid test < <(tail -n 1 "$model/$1.bleu")
    say "BLEU of $row${2:-}: newstest2013 $valid (published $(column 4)), newstest2014 $test (published $(column 5))"
}

# the beginning of the pairs of each split, so that a few seconds are enough
shorten() { # PAIRS
    local split language lines
    mkdir -p "$work/pairs"
    for split in train valid test; do
        lines=6
        [ $split != train ] || lines=200
        for language in en de; do
            [ -f "$1/$split.$language" ] || fail "$1 has no $split.$language"
            head -n "$lines" "$1/$split.$language" > "$work/pairs/$split.$language"
        done
    done
}

only_print='' smoke=''
while :; do
    case ${1:-} in
        --print) only_print=yes; shift ;;
        --smoke) [ $# -ge 2 ] || fail "--smoke needs a folder of pairs"; smoke=$2; shift 2 ;;
        *) break ;;
    esac
done
[ $# -ge 1 ] || fail "usage: train_wmt14.sh [--print] [--smoke PAIRS] ROW [flags of fairseq-train]; ROW is one of $(echo $(rows))"
row=$1; shift
rows | grep -qx -e "$row" || fail "no row $row: it is one of $(echo $(rows))"
work=${WORK:-$here/wmt14${smoke:+/smoke}}
model=$work/models/$(printf '%s' "$row $*" | sed -E 's/[^A-Za-z0-9.]+/-/g; s/-$//')
share_out
settings
training_command "$@"
if [ -n "$only_print" ]; then printf '%q ' "${command[@]}"; echo; exit; fi

command -v fairseq-train > /dev/null || fail "fairseq is not installed: see README.md"
say "Data"
if [ -n "$smoke" ]; then
    shorten "$smoke"
    VOCAB=${VOCAB:-200} CLEAN='' SENTENCES=0 bash "$here/prepare_pairs.sh" en de "$work/pairs/"{train,valid,test} "$work/data"
elif [ "$machine" = 0 ]; then
    bash "$here/prepare_wmt14_en_de.sh" "$work/data"
else
    [ -e "$work/data/bin" ] || fail "there is no $work/data/bin yet: the first machine makes it"
fi
mkdir -p "$model"
say "Training $row: $world GPUs x $steps steps of $tokens tokens (log: $model/train.log)"
if [ -e "$model/trained" ]; then echo "   (already there: $model)"; else train; fi
[ "$machine" = 0 ] || exit 0
[ -e "$model/checkpoint_best.pt" ] || fail "the training has made no $model/checkpoint_best.pt: see its log"
touch "$model/trained"
say "Evaluating $row (log: $model/checkpoint_best.log)"
evaluate checkpoint_best
if [ -n "${AVERAGE:-}" ]; then
    averaged=averaged_last_$AVERAGE
    [ -e "$model/$averaged.pt" ] \
        || python "$here/average_checkpoints.py" "$model" --last "$AVERAGE" --out "$model/$averaged.pt"
    evaluate "$averaged"
    report "$averaged" " (mean of the last $AVERAGE epochs)"
fi
report checkpoint_best
