#!/usr/bin/env bash
# IWSLT 2014 German-English (TED talks, WIT3, Cettolo et al. 2012) in 10,000 pieces, split much as in fairseq's example.
#
#     bash examples/translation/prepare_iwslt14_de_en.sh OUT            # download (20 MB), split, clean, binarise
#     bash examples/translation/prepare_iwslt14_de_en.sh OUT ARCHIVE    # with a de-en.tgz that is there
#
# Every 23rd pair of the training text is for validation; the test set is dev2010, dev2012 and tst2010 to tst2012 together.
# Training pairs of more than 175 words or a ratio above 1.5 are left out. fairseq's example cleans before it deals out the
# pairs, so its validation pairs are others, and its text is lower-cased and tokenised, which this is not: BLEU differs from
# the numbers published with that. The test set is the same. OUT is that of prepare_pairs.sh, whose
# VOCAB, PIECES and CLEAN count here, too. URL=address is another mirror. The talks are CC BY-NC-ND.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
url=${URL:-https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz}

fail() { printf 'prepare_iwslt14_de_en: %s\n' "$*" >&2; exit 1; }

source "$root/examples/download.sh"

# no trustworthy place that has a checksum of this archive is known to us
download_archive() { download "$url" "$1" first; }

split_text() { # ARCHIVE FOLDER
    [ ! -e "$2" ] || return 0
    rm -rf "$2.part"
    python "$root/examples/data/iwslt14_de_en.py" "$1" "$2.part" || fail "$1 is not the archive of IWSLT 2014"
    mv "$2.part" "$2"
}

[ $# = 1 ] || [ $# = 2 ] || fail "usage: prepare_iwslt14_de_en.sh OUT [ARCHIVE]"
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts
out=$1 archive=${2:-$1/downloads/de-en.tgz}
[ $# = 2 ] || download_archive "$archive"
mkdir -p "$out"
split_text "$archive" "$out/split"
VOCAB=${VOCAB:-10000} CLEAN=${CLEAN-175:1.5} exec bash "$root/examples/translation/prepare_pairs.sh" \
    de en "$out/split/train" "$out/split/valid" "$out/split/test" "$out"
