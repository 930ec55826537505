#!/usr/bin/env bash
# WikiText-103, word level, downloaded, checked and binarised for fairseq.
#
#     bash examples/language_model/prepare_wikitext103.sh            # download (190 MB), check, binarise
#     bash examples/language_model/prepare_wikitext103.sh TEXT       # binarise a folder of text instead
#
# TEXT holds wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or train.txt, valid.txt and test.txt:
# tokens between blanks, one paragraph a line. The result is $WORK/bin (default: examples/language_model/wikitext103).
# Running it again continues: a download where it stopped, a step only if it is not done. URL=address is another
# mirror of wikitext-103-v1.zip; the original one, s3.amazonaws.com/research.metamind.io, refuses since 2024.
# The text is CC BY-SA (Merity et al. 2016).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${WORK:-$root/examples/language_model/wikitext103}
url=${URL:-https://wikitext.smerity.com/wikitext-103-v1.zip}
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts

# SHA-1 of the three files, as GluonNLP's data sets have them (its sums for WikiText-2 are right, too)
checksums="b7497e2dfe77e72cfef5e3dbc61b7b53712ac211  wiki.train.tokens
c326ac59dc587676d58c422eb8a03e119582f92b  wiki.valid.tokens
8a5befc548865cec54ed4273cf87dbbad60d1e47  wiki.test.tokens"
# after binarisation: tokens with the </s> of every line, and types. The 267,735 types of the literature count <eos>
# and <unk>; fairseq's dictionary holds <s> and <pad> beside them, and dict.txt none of these four
counts="train 103227021
valid 217646
test 245569
types 267733"

say() { printf '\n== %s\n' "$*"; }

fail() { printf 'prepare_wikitext103: %s\n' "$*" >&2; exit 1; }

source "$root/examples/download.sh"

extract() {
    rm -rf "$work/extracted"
    python -m zipfile -e "$work/wikitext-103-v1.zip" "$work/extracted" \
        || fail "$work/wikitext-103-v1.zip is no whole zip file: delete it and run this again"
    [ -d "$work/extracted/wikitext-103" ] || fail "$work/wikitext-103-v1.zip holds no folder wikitext-103"
    check_text "$work/extracted/wikitext-103"
    rm -rf "$work/text" && mv "$work/extracted/wikitext-103" "$work/text" && rm -rf "$work/extracted"
}

check_text() {
    (cd "$1" && sha1sum --quiet -c - <<< "$checksums") \
        || fail "the text is not that of WikiText-103 (above): delete $work/wikitext-103-v1.zip and run this again"
}

# split TEXT NAME: its file
split() {
    local file
    for file in "$1/wiki.$2.tokens" "$1/$2.txt"; do
        if [ -f "$file" ]; then echo "$file"; return; fi
    done
    fail "$1 has neither wiki.$2.tokens nor $2.txt"
}

# binarise TEXT, unless it was done before. No made-up words: by default fairseq pads the dictionary to a multiple of 8
binarise() {
    local train valid test made_of
    train=$(split "$1" train) && valid=$(split "$1" valid) && test=$(split "$1" test)
    made_of=$(cat "$train" "$valid" "$test" | cksum)
    if [ -d "$work/bin" ]; then
        [ "$(cat "$work/bin/made-of")" = "$made_of" ] || fail "$work/bin was made of another text: set WORK to another folder"
        echo "   (already there: $work/bin)"; return
    fi
    rm -rf "$work/bin.part" && mkdir -p "$work"
    fairseq-preprocess --only-source --trainpref "$train" --validpref "$valid" --testpref "$test" \
        --padding-factor 1 --workers "$(nproc)" --destdir "$work/bin.part" > "$work/preprocess.log" 2>&1 \
        || fail "fairseq-preprocess failed: see $work/preprocess.log"
    count "$work/bin.part"
    echo "$made_of" > "$work/bin.part/made-of"
    mv "$work/bin.part" "$work/bin"
}

# count BIN: what is in it, as in $counts
count() {
    sed -n -E 's/.*(train|valid|test)(\.tokens|\.txt): [0-9]+ sents, ([0-9]+) tokens.*/\1 \3/p' "$work/preprocess.log" > "$1/counts"
    echo "types $(wc -l < "$1/dict.txt")" >> "$1/counts"
}

[ $# -le 1 ] || fail "usage: prepare_wikitext103.sh [TEXT]"
command -v fairseq-preprocess > /dev/null || fail "fairseq is not installed: see README.md"
if [ $# = 1 ]; then
    [ -d "$1" ] || fail "no folder $1"
    text=$1
else
    say "WikiText-103"
    text=$work/text
    if [ ! -d "$text" ]; then
        download "$url" "$work/wikitext-103-v1.zip" contents
        extract
    fi
fi
say "Binarising"
binarise "$text"
sed 's/^/   /' "$work/bin/counts"
if [ $# = 0 ] && [ "$(cat "$work/bin/counts")" != "$counts" ]; then
    fail "these are not the counts of WikiText-103 ($(echo $counts)): delete $work/bin and run this again"
fi
