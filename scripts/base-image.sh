#!/bin/bash
# Makes base images for functions from Debian packages, without any registry: a run image and a build image.
#
#   scripts/base-image.sh [--with PACKAGE]... [--lifecycle FOLDER] [--to PREFIX] [LAYOUT]
#
#   LAYOUT              folder for an OCI layout with the images `run` and `build` (default: none is left, the tree is kept)
#   --with PACKAGE      a Debian package more (python3-torch, criu); may be given again
#   --lifecycle FOLDER  what scripts/install-lifecycle.sh made, for the build image (default: where it makes it)
#   --to PREFIX         also copy to PREFIX-run:trixie and PREFIX-build:trixie, where PREFIX is one that skopeo knows:
#                       docker://REGISTRY/NAME, docker-daemon:NAME
#
# Needs root, debootstrap, umoci and skopeo. The packed tree is kept in $GPUFN_CACHE (default ~/.cache/gpufn), so that
# only the first run takes minutes. The same packages give the same digests.
set -euo pipefail
. "$(dirname "$0")/debian.sh"

cache=${GPUFN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gpufn}/base
lifecycle=${XDG_DATA_HOME:-$HOME/.local/share}/gpufn/lifecycle
packages=(ca-certificates python3 python3-venv)
user=1000 # "cnb"
to='' layout=''

fail() { # WHAT WHY HINT
    printf '%s\n' "base-image: $1" "$2" "$3" >&2
    exit 1
}

usage() {
    sed -n 's/^# \{0,1\}//; 2,14p' "$0" >&2
    exit 2
}

while (($#)); do
    case $1 in
    --with) packages+=("${2:?--with needs a package}") && shift 2 ;;
    --lifecycle) lifecycle=${2:?--lifecycle needs a folder} && shift 2 ;;
    --to) to=${2:?--to needs a prefix} && shift 2 ;;
    -*) usage ;;
    *) [ -z "$layout" ] || usage; layout=$1 && shift ;;
    esac
done
[ "$(id -u)" = 0 ] || fail "not root." "debootstrap makes files of many owners." "Run it as root, or in a container of your own."
for tool in debootstrap umoci skopeo; do
    command -v "$tool" >/dev/null || fail "no $tool here." "It makes or packs the images." "apt-get install debootstrap umoci skopeo"
done
[ -x "$lifecycle/lifecycle" ] || fail "no lifecycle in $lifecycle." "The build image has it in it." "Run scripts/install-lifecycle.sh, or name its folder with --lifecycle."

trim() { # TREE: what no function reads
    local tree=$1
    rm -rf "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree"/var/log/* "$tree"/var/cache/{debconf,ldconfig}/*
    rm -rf "$tree"/usr/share/{doc,doc-base,info,lintian,locale,man}/* "$tree"/var/lib/dpkg/*-old "$tree"/tmp/*
    # Test programs that Debian's torch brings, 90 MB.
    rm -rf "$tree"/usr/lib/libtorch-test "$tree"/usr/lib/python3/dist-packages/torch/bin/test_*
    # Nobody in a function's container becomes another user.
    find "$tree" -xdev -type f -perm /6000 -exec chmod ug-s {} +
    # The day on which it was made, as age of passwords that nobody has.
    sed -i 's/^\([^:]*:[^:]*\):[0-9]*:/\1::/' "$tree/etc/shadow"
    rm -f "$tree"/etc/{passwd,group,shadow,gshadow}-
    # Each machine writes its own.
    : >"$tree/etc/machine-id"
    rm -f "$tree"/etc/{hostname,resolv.conf}
}

add_user() { # TREE: at most one function process, never root
    echo "cnb:x:$user:$user::/home/cnb:/bin/sh" >>"$1/etc/passwd"
    echo "cnb:x:$user:" >>"$1/etc/group"
    install -d -o $user -g $user "$1/home/cnb"
    # A volume that is mounted here for snapshots is the user's from the start.
    install -d "$1/var/lib/gpufn" && install -d -o $user -g $user "$1/var/lib/gpufn/snapshots"
}

pack() { # TREE EPOCH TAR: no time newer than the packages', so that the same packages are the same bytes
    tar --create --file "$3" --directory "$1" --sort=name --numeric-owner --mtime="@$2" --clamp-mtime \
        --format=posix --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' --exclude='./dev/*' .
}

add_layer() { # IMAGE TAR MADE_BY
    umoci raw add-layer --image "$1" --history.author gpufn --history.created "$released" --history.created_by "$3" "$2"
    rm "$2"
}

settings() { # IMAGE KEY=VALUE...: its configuration, by umoci's option names
    local image=$1 options=() pair
    shift
    for pair in "$@"; do options+=("--config.${pair%%=*}" "${pair#*=}"); done
    umoci config --image "$layout:$image" --no-history --created "$released" --author gpufn "${options[@]}"
}

make_tree() { # FOLDER: an OCI layout whose image `root` is the packed tree, and the day of its packages
    local folder=$1 tree=$work/tree mirror list
    mirror=$(debian_mirror || true)
    mirror=${mirror:-http://deb.debian.org/debian}
    list=$(IFS=,; echo "${packages[*]}")
    echo "base-image: Debian $suite with ${packages[*]} (a minute or two)" >&2
    debootstrap --variant=minbase --force-check-gpg --keyring="$keyring" --include="$list" "$suite" "$tree" "$mirror" >"$work/log" 2>&1 ||
        fail "debootstrap failed." "$(tail -n 3 "$work/log")" "A mirror of Debian $suite is needed; asked was $mirror."
    local day
    day=$(sed -n 's/^Date: //p' "$tree"/var/lib/apt/lists/*_InRelease | head -n 1)
    add_user "$tree"
    trim "$tree"
    pack "$tree" "$(date --date="$day" +%s)" "$work/root.tar"
    rm -rf "$tree"
    umoci init --layout "$folder"
    umoci new --image "$folder:root"
    released=$(date --utc --date="$day" +%Y-%m-%dT%H:%M:%SZ)
    add_layer "$folder:root" "$work/root.tar" "debootstrap $suite ${packages[*]}"
    echo "$released" >"$folder/released"
}

make_run() {
    umoci tag --image "$layout:root" run
    settings run user=$user:$user workingdir=/home/cnb env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin env=LANG=C.UTF-8 \
        label=io.buildpacks.base.distro.name=debian label=io.buildpacks.base.distro.version=13 \
        label=io.buildpacks.base.id=dev.gpufn.base."$suite" label=io.buildpacks.base.maintainer=gpufn \
        label=io.buildpacks.base.released="$released" \
        "label=io.buildpacks.base.description=Debian $suite with ${packages[*]}" \
        label=io.buildpacks.stack.id=dev.gpufn.base."$suite" # pack before 0.33 compares it
}

make_build() { # the run image and the lifecycle; buildpacks and their order are the platform's to add
    local tree=$work/build
    install -d "$tree"/cnb/{lifecycle,buildpacks} "$tree"/platform/env
    install -d -o $user -g $user "$tree"/layers "$tree"/workspace
    cp -R -P --no-preserve=ownership "$lifecycle"/. "$tree/cnb/lifecycle"
    : >"$tree/cnb/order.toml"
    pack "$tree" "$(date --date="$released" +%s)" "$work/build.tar"
    umoci tag --image "$layout:run" build
    add_layer "$layout:build" "$work/build.tar" "lifecycle $(cat "$lifecycle/version" 2>/dev/null)"
    settings build workingdir=/workspace env=CNB_USER_ID=$user env=CNB_GROUP_ID=$user env=CNB_PLATFORM_API=0.13
}

work=$(mktemp -d -p "${TMPDIR:-/var/tmp}" gpufn-base.XXXXXX)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

# The tree's key: its packages, and what this script does to them.
key=$({ echo "$suite" "${packages[@]}"; declare -f trim add_user pack make_tree; } | sha256sum | cut -c1-16)
mkdir -p "$cache"
exec 9>"$cache/$key.lock"
flock 9
if [ ! -e "$cache/$key/released" ]; then
    rm -rf "$cache/$key.new"
    make_tree "$cache/$key.new"
    rm -rf "${cache:?}/$key"
    mv "$cache/$key.new" "$cache/$key"
fi
released=$(cat "$cache/$key/released")

[ -n "$layout" ] || layout=$work/layout
mkdir -p "$(dirname "$layout")"
rm -rf "$layout"
# Blobs never change: links where the cache is on the same disk.
cp -R --link "$cache/$key" "$layout" 2>/dev/null || { rm -rf "$layout" && cp -R "$cache/$key" "$layout"; }
rm "$layout/released" "$layout/index.json"
cp "$cache/$key/index.json" "$layout"
make_run
make_build
umoci rm --image "$layout:root"
umoci gc --layout "$layout"
echo "base-image: run and build of $released$([[ $layout = "$work"/* ]] || echo " in $layout")"

if [ -n "$to" ]; then
    [[ $to =~ ^docker://(127\.|localhost[:/]) ]] && plain=--dest-tls-verify=false || plain=
    for image in run build; do
        skopeo copy --quiet $plain "oci:$layout:$image" "$to-$image:$suite"
        echo "base-image: $to-$image:$suite"
    done
fi
