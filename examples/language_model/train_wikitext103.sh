#!/usr/bin/env bash
# One row of the WikiText-103 tables: trains the model, evaluates it as the paper does, prints both perplexities.
#
#     bash examples/language_model/train_wikitext103.sh ROW                  # ROW: a name in WIKITEXT103.md
#     bash examples/language_model/train_wikitext103.sh ROW --fp16           # further flags go to fairseq-train
#     bash examples/language_model/train_wikitext103.sh --print ROW          # the fairseq-train command alone
#     bash examples/language_model/train_wikitext103.sh --smoke TEXT ROW     # 3 updates on a folder of text, no download
#
# prepare_wikitext103.sh runs first where the data is missing. Running it again continues.
# GPUS=2 (default: all there are, 0: the CPU) and ACCUMULATE=4 (steps that make one update) share out the batch, which
# stays that of the paper. STRIDE=128 evaluates with windows that far apart (paper: 1). EVAL_BATCH=32: windows at a time.
# WORK=folder: data and models (default: examples/language_model/wikitext103, with --smoke its folder smoke).
# The paper's models took two V100 of 16 GB and less than four days each; none has been trained to the end here.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/examples/language_model
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts

say() { printf '\n== %s\n' "$*"; }

fail() { printf 'train_wikitext103: %s\n' "$*" >&2; exit 1; }

rows() { sed -n 's/^| `\([a-z0-9-]*\)` |.*/\1/p' "$here/WIKITEXT103.md"; }

# column N of the row's line: 2 size, 3 context, 4 tables, 5 valid, 6 test, 7 flags
column() {
    grep -F "| \`$row\` |" "$here/WIKITEXT103.md" | awk -F '|' -v n="$(($1 + 1))" '{ gsub(/^ +| +$|`/, "", $n); print $n }'
}

settings() {
    case $(column 2) in
        small) window=256 sequences=96 updates=500000 ;;
        medium) window=384 sequences=56 updates=400000 ;;
    esac
    warmup=2000
    interval=4000
    stride=${STRIDE:-1}
    small=()
    if [ -n "$smoke" ]; then
        window=64 sequences=2 updates=3 warmup=1 interval=0
        small=(--adaptive-input-cutoff 20,40,80 --adaptive-softmax-cutoff 20,40,80
            --no-last-checkpoints --no-save-optimizer-state)
    fi
}

# of an evaluation in windows
check_stride() {
    [[ $stride =~ ^[1-9][0-9]*$ ]] && [ "$stride" -le "$window" ] \
        || fail "STRIDE must be 1 to $window, the length of the windows, got $stride"
}

# how many streams a validation of a carried row reads: 10 in all, as the authors' (fairseq: the batch of the training)
validation_streams() {
    [ "$(column 3)" != carried ] || echo --batch-size-valid $((processes < 10 ? 10 / processes : 1))
}

# share out the sequences of an update: over GPUs, and over steps whose gradients are added up
share_out() {
    gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    accumulate=${ACCUMULATE:-1}
    processes=$((gpus > 0 ? gpus : 1))
    [ -z "$smoke" ] || sequences=$((2 * processes))
    [ $((sequences % (processes * accumulate))) = 0 ] \
        || fail "$sequences sequences an update cannot be shared out over $processes GPUs x $accumulate steps"
    if [ "$(column 3)" = carried ] && [ "$accumulate" != 1 ]; then
        fail "$row carries one state a sequence from update to update: ACCUMULATE must be 1"
    fi
    device=()
    if [ "$gpus" = 0 ]; then device=(--cpu); fi
}

# whether every segment is read alone or goes on from the state that the one before it left
reading() {
    case $(column 3) in
        window) echo --task language_modeling ;;
        carried) echo --task stateful_language_modeling ;;
    esac
}

training_command() {
    command=(fairseq-train "$work/bin" --user-dir "$root/fairseq_fastweights" --save-dir "$model"
        $(reading) --tokens-per-sample "$window"
        --arch "fast_weight_lm_wt103_$(column 2)" --dropout 0.1 ${small[@]+"${small[@]}"} $(column 7)
        --criterion adaptive_loss --ddp-backend legacy_ddp
        --optimizer torch_adam --lr 2.5e-4 --clip-norm 0.25
        --lr-scheduler cosine --warmup-updates "$warmup" --max-update "$updates"
        --batch-size $((sequences / processes / accumulate)) --update-freq "$accumulate" $(validation_streams)
        --required-batch-size-multiple 1 --distributed-world-size "$processes" ${device[@]+"${device[@]}"} --seed 1111
        --validate-interval 1000 --validate-interval-updates "$interval"
        --save-interval 1000 --save-interval-updates "$interval" --keep-interval-updates 1 --no-epoch-checkpoints
        --log-format simple --log-interval 100 "$@")
}

train() {
    "${command[@]}" 2>&1 | tee -a "$model/train.log" | show_progress
}

show_progress() {
    sed -n -u -E \
        -e "s/.* loss=.*, ppl=([0-9.]+), wps=([0-9.]+).*num_updates=([0-9]+).*wall=([0-9]+).*/   update \3 of $updates   perplexity \1   \2 tokens\/s   \4 s/p" \
        -e "s/.*valid on 'valid' subset.* ppl ([0-9.]+) .*/   validation perplexity of segments \1/p" \
        -e '/^[A-Za-z_.]*Error|error: /p'
}

# Windows of $window tokens that end $stride tokens apart; what counts are the last $stride of each. fairseq takes
# --context-window off --tokens-per-sample. Only one process with one worker may read: the windows are made in turn.
windows() {
    echo --task language_modeling --tokens-per-sample "$window" --context-window $((window - stride)) \
        --batch-size "${EVAL_BATCH:-32}" --softmax-batch 1024
}

# one stream from its beginning to its end, in segments, the state carried
stream() { echo $(reading) --tokens-per-sample "$window" --batch-size 1; }

# where a result lies: of windows, another for every stride
result() { # SPLIT
    if [ "$(column 3)" = window ]; then echo "$model/$1-stride$stride"; else echo "$model/$1"; fi
}

evaluate() { # SPLIT
    local how=windows result
    result=$(result "$1")
    [ "$(column 3)" = window ] || how=stream
    fairseq-eval-lm "$work/bin" --user-dir "$root/fairseq_fastweights" --path "$model/checkpoint_best.pt" \
        --gen-subset "$1" $($how) --num-workers 1 --distributed-world-size 1 ${device[@]+"${device[@]}"} \
        --no-progress-bar > "$result.log" 2>&1 || fail "fairseq-eval-lm failed: see $result.log"
    sed -n 's/.*Perplexity: \([0-9.]*\).*/\1/p' "$result.log" > "$result.ppl.part"
    [ -s "$result.ppl.part" ] || fail "fairseq-eval-lm gave no perplexity: see $result.log"
    mv "$result.ppl.part" "$result.ppl"
}

# words N FILE: its first N words
words() {
    awk -v n="$1" '{ for (i = 1; i <= NF && seen < n; i++) { printf "%s ", $i; seen++ } print "" } seen >= n { exit }' "$2"
}

# the beginning of the text of each split, so that a few seconds are enough
shorten() { # TEXT
    local split file
    mkdir -p "$work/text"
    for split in train valid test; do
        file=$1/$split.txt
        [ -f "$file" ] || file=$1/wiki.$split.tokens
        [ -f "$file" ] || fail "$1 has neither $split.txt nor wiki.$split.tokens"
        if [ $split = train ]; then words 3000 "$file"; else words 100 "$file"; fi > "$work/text/$split.txt"
    done
}

only_print='' smoke=''
while :; do
    case ${1:-} in
        --print) only_print=yes; shift ;;
        --smoke) [ $# -ge 2 ] || fail "--smoke needs a folder of text"; smoke=$2; shift 2 ;;
        *) break ;;
    esac
done
[ $# -ge 1 ] || fail "usage: train_wikitext103.sh [--print] [--smoke TEXT] ROW [flags of fairseq-train]; ROW is one of $(echo $(rows))"
row=$1; shift
rows | grep -qx -e "$row" || fail "no row $row: it is one of $(echo $(rows))"
[ "$(column 3)" != published ] || fail "$row is listed for comparison only: it is not a model of this plugin"
work=${WORK:-$here/wikitext103${smoke:+/smoke}}
model=$work/models/$(printf '%s' "$row $*" | sed -E 's/[^A-Za-z0-9.]+/-/g; s/-$//')
settings
check_stride
share_out
training_command "$@"
if [ -n "$only_print" ]; then printf '%q ' "${command[@]}"; echo; exit; fi

command -v fairseq-train > /dev/null || fail "fairseq is not installed: see README.md"
if [ -z "$smoke" ]; then
    WORK=$work bash "$here/prepare_wikitext103.sh"
else
    shorten "$smoke"
    WORK=$work bash "$here/prepare_wikitext103.sh" "$work/text"
fi
mkdir -p "$model"
say "Training $row (log: $model/train.log)"
if [ -e "$model/trained" ]; then echo "   (already there: $model)"; else train; touch "$model/trained"; fi
for split in valid test; do
    result=$(result $split)
    say "Evaluating $row on $split (log: $result.log)"
    if [ -e "$result.ppl" ]; then echo "   (already there: $result.ppl)"; else evaluate $split; fi
done
apart=
if [ "$(column 3)" = window ] && [ "$stride" != 1 ]; then apart=" (windows $stride apart; published: 1)"; fi
say "Perplexity of $row$apart: valid $(cat "$(result valid).ppl") (published $(column 5)), test $(cat "$(result test).ppl") (published $(column 6))"
