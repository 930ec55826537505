#!/usr/bin/env bash
# WMT 2014 English-German (Bojar et al. 2014): Europarl v7, Common Crawl, News Commentary v9, in 32,000 joint pieces.
#
#     bash examples/translation/prepare_wmt14_en_de.sh OUT              # download (1.7 GB), clean, binarise
#     bash examples/translation/prepare_wmt14_en_de.sh OUT DOWNLOADS    # with what was downloaded before
#     PIECES=subword-nmt bash examples/translation/prepare_wmt14_en_de.sh OUT   # fastBPE-compatible pieces instead
#
# Validation is newstest2013, the test newstest2014 (all 3003 sentences; sacreBLEU's wmt14/full). DOWNLOADS, by default
# OUT/downloads, holds the three archives and newstest201{3,4}.{en,de}. Training pairs of more than 250 words or a ratio above
# 1.5 are left out, as in fairseq's example. The pieces are learned from 5,000,000 lines. OUT is that of prepare_pairs.sh,
# whose VOCAB, PIECES, CLEAN and SENTENCES count here, too. Running it again goes on. Not run on the whole text yet: 10 GB of
# disk are an estimate.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
command -v fairseq-train > /dev/null || PATH=$root/.venv/bin:$PATH  # an environment that is activated counts

# SHA-256 as TensorFlow Datasets has them (url_checksums/wmt14_translate.txt)
archives="0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7 wmt13/training-parallel-europarl-v7.tgz training/europarl-v7.de-en
c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5 wmt13/training-parallel-commoncrawl.tgz commoncrawl.de-en
cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485 wmt14/training-parallel-nc-v9.tgz training/news-commentary-v9.de-en"

fail() { printf 'prepare_wmt14_en_de: %s\n' "$*" >&2; exit 1; }

source "$root/examples/download.sh"

download_archives() { # FOLDER
    local sum path member
    while read -r sum path member; do
        download "https://www.statmt.org/$path" "$1/$(basename "$path")" "sha256:$sum"
    done <<< "$archives"
}

# sacreBLEU downloads the test sets, checks their MD5 and takes them out of their SGML
download_test_sets() { # FOLDER
    test_set wmt13 src "$1/newstest2013.en" && test_set wmt13 ref "$1/newstest2013.de"
    test_set wmt14/full src "$1/newstest2014.en" && test_set wmt14/full ref "$1/newstest2014.de"
}

test_set() { # NAME SIDE FILE
    [ ! -e "$3" ] || return 0
    SACREBLEU=$(dirname "$3")/sacrebleu sacrebleu -t "$1" -l en-de --echo "$2" > "$3.part" \
        || fail "sacreBLEU cannot download $1: run this again"
    mv "$3.part" "$3"
}

# the three training texts after one another
join_training_text() { # FOLDER OUT
    local sum path member language archive
    for language in en de; do
        [ ! -e "$2/train.$language" ] || continue
        while read -r sum path member; do
            archive=$1/$(basename "$path")
            [ -e "$archive" ] || fail "there is no $archive"
            tar -xzOf "$archive" "$member.$language" || fail "$archive holds no $member.$language"
        done <<< "$archives" > "$2/train.$language.part"
        mv "$2/train.$language.part" "$2/train.$language"
    done
}

[ $# = 1 ] || [ $# = 2 ] || fail "usage: prepare_wmt14_en_de.sh OUT [DOWNLOADS]"
out=$1 from=${2:-$1/downloads}
mkdir -p "$out/joined"
if [ $# = 1 ]; then
    download_archives "$from"
    download_test_sets "$from"
fi
join_training_text "$from" "$out/joined"
VOCAB=${VOCAB:-32000} CLEAN=${CLEAN-250:1.5} SENTENCES=${SENTENCES:-5000000} exec bash "$root/examples/translation/prepare_pairs.sh" \
    en de "$out/joined/train" "$from/newstest2013" "$from/newstest2014" "$out"
