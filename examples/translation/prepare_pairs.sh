#!/usr/bin/env bash
# Binarises sentence pairs for translation; nothing is downloaded.
#
#     bash examples/translation/prepare_pairs.sh en de TRAIN VALID TEST OUT               # joint sentencepiece, 8000 pieces
#     VOCAB=32000 bash examples/translation/prepare_pairs.sh en de TRAIN VALID TEST OUT   # more pieces
#     PIECES=subword-nmt bash examples/translation/prepare_pairs.sh ...                   # Moses tokens, cut by subword-nmt
#     CLEAN=250:1.5 bash examples/translation/prepare_pairs.sh ...                        # without odd training pairs
#
# TRAIN, VALID and TEST are prefixes: TRAIN.en and TRAIN.de hold a sentence a line, as people write it. OUT/bin is what
# fairseq-train takes (joined dictionary). OUT/raw has valid and test as they came, for sacreBLEU, OUT/text what was cut,
# OUT/pieces the pieces and their model (spm.model; of subword-nmt codes, and codes.fastbpe for fastBPE), OUT/counts the
# pairs and tokens of each split. The pieces are learned from the training text of both languages.
# CLEAN=LENGTH:RATIO leaves out training pairs with an empty side, more than LENGTH words in one, or more than RATIO times
# as many in one as in the other. SENTENCES=5000000 learns sentencepiece's from so many lines, drawn by a fixed seed.
# Running it again does what is missing; other text or settings need another OUT.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
vocab=${VOCAB:-8000} kind=${PIECES:-sentencepiece} clean=${CLEAN:-} sentences=${SENTENCES:-0}
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts

fail() { printf 'prepare_pairs: %s\n' "$*" >&2; exit 1; }

lines_of() { awk 'END { print NR }' "$1"; }

[ $# = 6 ] || fail "usage: prepare_pairs.sh SOURCE TARGET TRAIN VALID TEST OUT (languages, prefixes of text, a folder)"
source=$1 target=$2 out=$6
declare -A prefix=([train]=$3 [valid]=$4 [test]=$5)
[ "$source" != "$target" ] || fail "SOURCE and TARGET must be two languages, got '$source' twice"
for split in train valid test; do
    for language in "$source" "$target"; do
        [ -s "${prefix[$split]}.$language" ] || fail "there is no ${prefix[$split]}.$language, or it is empty"
    done
    lines=$(lines_of "${prefix[$split]}.$source") others=$(lines_of "${prefix[$split]}.$target")
    [ "$lines" = "$others" ] \
        || fail "${prefix[$split]}.$source has $lines lines, ${prefix[$split]}.$target $others: they must be translations line by line"
done
[[ $vocab =~ ^[1-9][0-9]*$ ]] || fail "VOCAB must be a number of pieces, got '$vocab'"
[[ $kind =~ ^(sentencepiece|subword-nmt)$ ]] || fail "PIECES must be 'sentencepiece' or 'subword-nmt', got '$kind'"
[[ $clean =~ ^([1-9][0-9]*:[0-9]+(\.[0-9]+)?)?$ ]] || fail "CLEAN must be LENGTH:RATIO such as 250:1.5, got '$clean'"
[[ $sentences =~ ^[0-9]+$ ]] || fail "SENTENCES must be a number of lines, got '$sentences'"
mkdir -p "$out"

text_of() { cat "${prefix[$1]}.$source" "${prefix[$1]}.$target"; }

# of what OUT was made: its steps are to be done again for nothing else
made_of="$source-$target VOCAB=$vocab PIECES=$kind CLEAN=$clean SENTENCES=$sentences $(for split in train valid test; do text_of $split; done | cksum)"
[ -e "$out/made-of" ] || echo "$made_of" > "$out/made-of"
[ "$(cat "$out/made-of")" = "$made_of" ] || fail "$out was made of other text or settings ($(cat "$out/made-of")): take another folder"

# step FOLDER COMMAND...: the command fills FOLDER.part, which then becomes FOLDER
step() {
    local folder=$out/$1; shift
    [ ! -e "$folder" ] || return 0
    rm -rf "$folder.part" && mkdir "$folder.part"
    "$@" "$folder.part"
    mv "$folder.part" "$folder"
}

keep_raw() {
    local split language
    for split in valid test; do
        for language in "$source" "$target"; do cp "${prefix[$split]}.$language" "$1/$split.$language"; done
    done
}

tidy() {
    python "$root/examples/data/tidy_pairs.py" --languages "$source" "$target" --train "${prefix[train]}" \
        --valid "${prefix[valid]}" --test "${prefix[test]}" ${clean:+--clean "$clean"} "$1" || fail "tidying the text failed"
}

cut_into_pieces() {
    case $kind in
        sentencepiece)
            python "$root/examples/data/sentencepieces.py" "$out/text" "$1" --languages "$source" "$target" \
                --size "$vocab" --type bpe --sentences "$sentences" || fail "sentencepiece failed: has the text $vocab pieces?" ;;
        subword-nmt)
            python "$root/examples/data/subwords.py" "$out/text" "$1" --languages "$source" "$target" \
                --size "$vocab" || fail "subword-nmt failed" ;;
    esac
}

binarise() {
    fairseq-preprocess --source-lang "$source" --target-lang "$target" --joined-dictionary --workers "$(nproc)" \
        --trainpref "$out/pieces/train" --validpref "$out/pieces/valid" --testpref "$out/pieces/test" \
        --destdir "$1" > "$out/preprocess.log" 2>&1 || fail "fairseq-preprocess failed: see $out/preprocess.log"
}

count() {
    local split
    for split in train valid test; do
        echo "$split: $(lines_of "$out/text/$split.$source") pairs, $(tokens "$split" "$source") + $(tokens "$split" "$target") tokens"
    done > "$out/counts.part"
    mv "$out/counts.part" "$out/counts"
}

# with the </s> of every line
tokens() { awk '{ n += NF + 1 } END { printf "%d", n }' "$out/pieces/$1.$2"; }

if [ -e "$out/bin" ] && [ -e "$out/counts" ]; then echo "   (already there: $out)"; exit; fi
step raw keep_raw
step text tidy
echo "   $vocab pieces by $kind"
step pieces cut_into_pieces
[ -e "$out/counts" ] || count
step bin binarise
sed 's/^/   /' "$out/counts"
