# Downloads with checksums, for the recipes: source it after a function fail is defined.
#
#     download URL FILE sha256:SUM     (md5:, sha1: or sha256:)  FILE must have this checksum
#     download URL FILE first          no checksum is published: that of the first download is kept in FILE.sha256
#     download URL FILE contents       no check here: what is in FILE is checked by the caller
#
# A FILE that is there and right is not downloaded again; a download that was stopped goes on where it was.

# checksum KIND FILE
checksum() { "${1}sum" "$2" | cut -d ' ' -f 1; }

download() {
    local url=$1 file=$2 expected=$3 part=$2.part
    if [ ! -e "$file" ]; then
        command -v curl > /dev/null || fail "the download needs curl"
        mkdir -p "$(dirname "$file")"
        echo "   $url"
        _is_whole "$part" "$expected" || _fetch "$url" "$part"
        _check_download "$part" "$url" "$expected"
        mv "$part" "$file"
    elif [[ $expected == *:* ]] && ! _is_whole "$file" "$expected"; then
        fail "$file has another ${expected%%:*} checksum than ${expected#*:}: delete it and run this again"
    fi
    _remember_checksum "$file" "$expected"
}

# _is_whole FILE EXPECTED: whether it is there and has the checksum; a part is whole after a stop during its check
_is_whole() { [[ $2 == *:* ]] && [ -e "$1" ] && [ "$(checksum "${2%%:*}" "$1")" = "${2#*:}" ]; }

# _fetch URL PART: with a bar on a terminal
_fetch() {
    local progress=(--silent --show-error)
    [ ! -t 2 ] || progress=(--progress-bar)
    curl --fail --location "${progress[@]}" --retry 3 --continue-at - --output "$2" "$1" \
        || fail "cannot download $1: run this again to continue"
}

# _check_download PART URL EXPECTED: a part with a wrong checksum cannot be gone on with
_check_download() {
    local kind=${3%%:*} found
    case $3 in
        first | contents) return ;;
        md5:* | sha1:* | sha256:*) found=$(checksum "$kind" "$1") ;;
        *) fail "download: a checksum is md5:, sha1:, sha256:, 'first' or 'contents', got '$3'" ;;
    esac
    if [ "$found" != "${3#*:}" ]; then
        rm "$1"
        fail "$2 has the $kind checksum $found, not ${3#*:}: it was cut off or is another file; run this again"
    fi
}

# _remember_checksum FILE EXPECTED
_remember_checksum() {
    local sum
    [ "$2" = first ] || return 0
    sum=$(checksum sha256 "$1")
    if [ ! -e "$1.sha256" ]; then
        echo "$sum" > "$1.sha256"
        echo "   no checksum of $(basename "$1") is published; kept that of this download, in $1.sha256: $sum"
    elif [ "$(cat "$1.sha256")" != "$sum" ]; then
        fail "$1 is not what was first downloaded ($1.sha256): delete both and run this again"
    fi
}
