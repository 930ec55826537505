#!/usr/bin/env bash
# From an empty clone to a trained English-German translation model and its translations.
#
#     bash examples/quickstart.sh                       # the delta rule in the decoder
#     bash examples/quickstart.sh --update-rule sum     # compare: further flags go to fairseq-train
#     bash examples/quickstart.sh --update-rule softmax
#
# Needs Debian or Ubuntu, Python 3.10 to 3.12, no GPU and no root (but for 'apt-get update', if that was never run).
# Text: LibreOffice's help in both languages (MPL-2.0), 35,000 sentence pairs. Model: 2 + 2 layers of width 192.
# Expected: BLEU 18.6 for the delta rule; 7 minutes in all on 2 cores of an AMD EPYC, 5.5 of them training
# (2026-11-24, torch 2.13.0; download and installation, 1 minute there, are printed apart).
# Running it again reuses what is there; WORK=folder and VENV=folder say where (default: examples/quickstart, .venv).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${WORK:-$root/examples/quickstart}
venv=${VENV:-$root/.venv}
threads=$(nproc)
updates=2000
mkdir -p "$work"

say() { printf '\n== %s\n' "$*"; }

fail() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

# step NAME COMMAND...: run it unless it was done before; what is half done is done again
step() {
    local name=$1; shift
    if [ -e "$work/done/$name" ]; then echo "   (already there: $name)"; return; fi
    "$@"
    mkdir -p "$work/done" && touch "$work/done/$name"
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    fail "no Python 3.10 to 3.12 found; set PYTHON"
}

install() {
    local python wanted
    wanted=$(cat "$root/setup.py" "$root/constraints.txt" | cksum)
    if [ "$(cat "$venv/installed-for-examples" 2>/dev/null)" = "$wanted" ]; then
        echo "   (already there: $venv)"; return
    fi
    python=$(find_python)
    [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" \
        || fail "cannot make a virtual environment: apt-get install python3-venv"
    echo "   torch"
    "$venv/bin/pip" install -q -c "$root/constraints.txt" torch
    echo "   fairseq and this plugin"
    "$venv/bin/pip" install -q -c "$root/constraints.txt" -e "$root[examples]"
    echo "$wanted" > "$venv/installed-for-examples"
}

download_text() {
    local packages="libreoffice-help-en-us libreoffice-help-de"
    command -v apt-get > /dev/null || fail "the text comes from Debian's or Ubuntu's packages, and there is no apt-get here"
    if ! apt-cache show $packages > /dev/null 2>&1; then
        [ "$(id -u)" = 0 ] || fail "apt knows no package lists: run 'apt-get update' once as root"
        apt-get -qq update
    fi
    rm -rf "$work/packages" && mkdir -p "$work/packages"
    # as another user apt could not write here, and says so in a warning that means nothing
    (cd "$work/packages" && apt-get -qq download $packages 2> download.log) \
        || fail "cannot download $packages (old lists? run 'apt-get update' as root): $(tail -n 1 "$work/packages/download.log")"
}

extract_text() {
    local package
    for package in "$work"/packages/*.deb; do dpkg -x "$package" "$work/packages/unpacked"; done
    python "$root/examples/data/libreoffice_en_de.py" "$work/packages/unpacked" "$work/text"
    rm -rf "$work/packages/unpacked"
}

learn_pieces() {
    python "$root/examples/data/sentencepieces.py" "$work/text" "$work/pieces" --languages en de --size 4000
}

binarise() {
    rm -rf "$work/bin"
    fairseq-preprocess --source-lang en --target-lang de --joined-dictionary --workers "$threads" \
        --trainpref "$work/pieces/train" --validpref "$work/pieces/valid" --testpref "$work/pieces/test" \
        --destdir "$work/bin" > "$work/preprocess.log" 2>&1 || fail "fairseq-preprocess failed: see $work/preprocess.log"
}

# progress: of fairseq's log, the lines a person wants to see
train() {
    fairseq-train "$work/bin" --user-dir "$root/fairseq_fastweights" --save-dir "$model" \
        --arch fast_weight_transformer --share-all-embeddings --dropout 0 \
        --encoder-layers 2 --encoder-embed-dim 192 --encoder-ffn-embed-dim 512 --encoder-attention-heads 4 \
        --decoder-layers 2 --decoder-embed-dim 192 --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 \
        --encoder-normalize-before --decoder-normalize-before \
        --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
        --lr 2.5e-3 --warmup-updates 200 --lr-scheduler polynomial_decay --total-num-update "$updates" \
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
        --max-tokens 1000 --max-update "$updates" --num-workers 0 --seed 1 --no-epoch-checkpoints \
        --log-format simple --log-interval 50 "$@" 2>&1 | tee "$model.log" | show_progress
}

show_progress() {
    sed -n -u -E \
        -e "s/.*nll_loss=([0-9.]+), ppl=([0-9.]+), wps=([0-9.]+).*num_updates=([0-9]+).*wall=([0-9]+)$/   update \4 of $updates   perplexity \2   \3 tokens\/s   \5 s/p" \
        -e "s/.*valid on 'valid' subset.*nll_loss ([0-9.]+) \| ppl ([0-9.]+).*/   validation perplexity \2/p" \
        -e '/^[A-Za-z_.]*Error|error: /p'
}

translate() {
    fairseq-generate "$work/bin" --user-dir "$root/fairseq_fastweights" --path "$model/checkpoint_last.pt" \
        --beam 5 --remove-bpe sentencepiece --required-batch-size-multiple 1 \
        > "$model/generated" 2> "$model/generate.log" || fail "fairseq-generate failed: see $model/generate.log"
    # H-<sentence> <score> <translation>, in order of length; back into the order of the text
    grep '^H-' "$model/generated" | sed 's/^H-//' | sort -n | cut -f 3 > "$model/test.de"
}

show_samples() {
    python "$root/examples/data/side_by_side.py" --samples 10 \
        source="$work/text/test.en" reference="$work/text/test.de" translation="$model/test.de"
}

name=$(printf '%s' "${*:-delta}" | sed -E 's/--update-rule[ =]//; s/[^A-Za-z0-9.]+/-/g')
model=$work/models/$name
mkdir -p "$model"

say "English-German text from Debian's LibreOffice help"
started=$SECONDS
step download download_text
echo "   download: $((SECONDS - started)) s"
say "Installing into $venv"
started=$SECONDS
install
echo "   installation: $((SECONDS - started)) s"
started=$SECONDS
# passive: threads that spin while they wait make a training that shares its cores ten times slower
export PATH=$venv/bin:$PATH OMP_NUM_THREADS=$threads OMP_WAIT_POLICY=passive
say "Preparing the text"
step text extract_text
step pieces learn_pieces
step binarised binarise
say "Training: $name, $updates updates (log: $model.log)"
step "trained-$name" train "$@"
say "Translating the test set with beam 5"
step "translated-$name" translate
show_samples
say "BLEU of $name on $(wc -l < "$work/text/test.de") test sentences ($((SECONDS - started)) s without download and installation)"
sacrebleu "$work/text/test.de" -i "$model/test.de" -m bleu -f text -w 1
