#!/usr/bin/env bash
# Binarises text for language models; nothing is downloaded.
#
#     bash examples/language_model/prepare_text.sh FOLDER OUT               # sentencepiece BPE, 4000 pieces
#     VOCAB=8000 bash examples/language_model/prepare_text.sh FOLDER OUT    # more pieces
#     VOCAB=words bash examples/language_model/prepare_text.sh FOLDER OUT   # words as they stand between blanks
#
# FOLDER holds train.txt, valid.txt and test.txt. OUT is what fairseq-train takes; beside it OUT/pieces has the pieces
# and their model, OUT/tokens how many words and tokens each split has. The vocabulary is learned from train.txt alone;
# of words it is every one there. A line ends with fairseq's </s>, which is WikiText's <eos>. Empty lines are kept: in
# the token counts and perplexities of the literature they are a token, too. Running it again does what is missing;
# another text or VOCAB needs another OUT. WikiText-2 in 4000 pieces takes half a minute on one core.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
vocab=${VOCAB:-4000}
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts

fail() { printf 'prepare_text: %s\n' "$*" >&2; exit 1; }

[ $# = 2 ] || fail "usage: prepare_text.sh FOLDER OUT (FOLDER holds train.txt, valid.txt and test.txt)"
text=$1 out=$2
for split in train valid test; do
    [ -s "$text/$split.txt" ] || fail "there is no $text/$split.txt, or it is empty"
done
[[ $vocab =~ ^[1-9][0-9]*$ || $vocab = words ]] || fail "VOCAB must be a number of pieces or 'words', got '$vocab'"
mkdir -p "$out"

# of what OUT was made: its steps are to be done again for nothing else
made_of="VOCAB=$vocab $(cat "$text"/{train,valid,test}.txt | cksum)"
[ -e "$out/made-of" ] || echo "$made_of" > "$out/made-of"
[ "$(cat "$out/made-of")" = "$made_of" ] || fail "$out was made of another text or VOCAB: take another folder"

# of every split: tokens if every word is one, and tokens as they are binarised; both with an end of every line
count_tokens() {
    local split
    for split in train valid test; do
        echo "$split $(count "$text/$split.txt") $(count "$1/$split.txt")"
    done > "$out/tokens.part"
    mv "$out/tokens.part" "$out/tokens"
}

count() { awk '{ tokens += NF + 1 } END { printf "%d", tokens }' "$1"; }

cut_into_pieces() {
    rm -rf "$out/pieces.part"
    python "$root/examples/data/sentencepieces.py" "$text" "$out/pieces.part" \
        --languages txt --size "$vocab" --type bpe || fail "sentencepiece failed"
    mv "$out/pieces.part" "$out/pieces"
}

# dict.txt is moved last: with it the folder is complete
binarise() {
    local from=$1 part=$out/binarised.part
    rm -rf "$part"
    fairseq-preprocess --only-source --workers "$(nproc)" --destdir "$part" \
        --trainpref "$from/train.txt" --validpref "$from/valid.txt" --testpref "$from/test.txt" \
        > "$out/preprocess.log" 2>&1 || fail "fairseq-preprocess failed: see $out/preprocess.log"
    mv "$part"/{train,valid,test}.{bin,idx} "$out" && mv "$part/dict.txt" "$out"
    rm -r "$part"
}

if [ -e "$out/dict.txt" ] && [ -e "$out/tokens" ]; then echo "   (already there: $out)"; exit; fi
if [ "$vocab" = words ]; then
    echo "   words of $text"
    cut=$text
else
    echo "   $vocab pieces of $text"
    cut=$out/pieces
    [ -e "$cut" ] || cut_into_pieces
fi
[ -e "$out/tokens" ] || count_tokens "$cut"
[ -e "$out/dict.txt" ] || binarise "$cut"
while read -r split words tokens; do echo "   $split: $words words, $tokens tokens"; done < "$out/tokens"
