#!/usr/bin/env bash
# Multi30k English-German (29,000 + 1014 + 1000 image descriptions, Elliott et al. 2016), in 8000 pieces.
#
#     bash examples/translation/prepare_multi30k.sh OUT           # download (1.3 MB), check, binarise
#     bash examples/translation/prepare_multi30k.sh OUT TEXT      # binarise a folder of text instead
#
# TEXT holds train.en, val.en, test_2016_flickr.en and the same in .de. OUT is that of prepare_pairs.sh, whose VOCAB and
# PIECES count here, too; downloads lie in OUT/downloads. It takes 23 seconds on a busy core of an AMD EPYC, without the
# download. The captions come from Flickr30k; the repository names no licence.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)

# computed from the files of this commit of github.com/multi30k/dataset, the last one when this was written; the texts of
# the test set are those in the archive whose MD5 sacreBLEU has for its multi30k/2016
url=https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw
checksums="d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f  train.en
726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6  train.de
14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28  val.en
f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a  val.de
611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9  test_2016_flickr.en
9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8  test_2016_flickr.de"

fail() { printf 'prepare_multi30k: %s\n' "$*" >&2; exit 1; }

source "$root/examples/download.sh"

download_text() { # FOLDER
    local sum name
    while read -r sum name; do
        download "$url/$name.gz" "$1/$name.gz" "sha256:$sum"
        [ -e "$1/$name" ] || { gunzip -c "$1/$name.gz" > "$1/$name.part" && mv "$1/$name.part" "$1/$name"; }
    done <<< "$checksums"
}

[ $# = 1 ] || [ $# = 2 ] || fail "usage: prepare_multi30k.sh OUT [TEXT]"
out=$1 text=${2:-$1/downloads}
[ $# = 2 ] || download_text "$text"
exec bash "$root/examples/translation/prepare_pairs.sh" en de "$text/train" "$text/val" "$text/test_2016_flickr" "$out"
