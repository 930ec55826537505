#!/usr/bin/env bash
# WikiText-2 (word level, 4.5 MB, CC BY-SA, Merity et al. 2016), downloaded and checked: train.txt, valid.txt, test.txt.
#
#     bash examples/language_model/prepare_wikitext2.sh OUT
#
# URL=address is another mirror of wikitext-2-v1.zip; the original one, s3.amazonaws.com/research.metamind.io, refuses.
# Whoever has the three files needs no download: prepare_text.sh and compare_wikitext2.sh take their folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
url=${URL:-https://wikitext.smerity.com/wikitext-2-v1.zip}

# of the official text, train.txt with 2,088,628 tokens and valid.txt and test.txt with 217,646 and 245,569 (<eos> counted)
checksums="9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f  train.txt
f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8  valid.txt
d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0  test.txt"

fail() { printf 'prepare_wikitext2: %s\n' "$*" >&2; exit 1; }

source "$root/examples/download.sh"

[ $# = 1 ] || fail "usage: prepare_wikitext2.sh OUT"
out=$1
if [ -e "$out/test.txt" ]; then echo "   (already there: $out)"; exit; fi
part=$out.part archive=$out.zip
download "$url" "$archive" contents
rm -rf "$part" && mkdir -p "$part"
python3 -m zipfile -e "$archive" "$part" || fail "$url is no zip file: delete $archive and run this again"
for split in train valid test; do
    mv "$part/wikitext-2/wiki.$split.tokens" "$part/$split.txt" || fail "$url holds no wikitext-2/wiki.$split.tokens"
done
(cd "$part" && sha256sum --quiet -c - <<< "$checksums") || fail "$url holds another text than WikiText-2 (above): delete $archive"
rm -r "$archive" "$part/wikitext-2"
mkdir -p "$out" && mv "$part"/*.txt "$out" && rmdir "$part"
