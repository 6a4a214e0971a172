#!/bin/sh
# Puts a private Docker daemon into one folder, touching nothing else of the system.
#
# Debian 12's Docker 20.10 refuses the capability CHECKPOINT_RESTORE, which a container needs to restore a snapshot;
# the next release's 26.1 gives it. Its daemon and containerd run with the older system's libraries and runc.
#
#   scripts/install-docker.sh [FOLDER]      default: ~/.local/share/gpufn/docker
set -eu
. "$(dirname "$0")/debian.sh"

folder=${1:-${XDG_DATA_HOME:-$HOME/.local/share}/gpufn/docker}

fail() { # WHAT WHY HINT
    printf '%s\n' "install-docker: $1" "$2" "$3" >&2
    exit 1
}

report() { echo "docker: $("$folder/dockerd" --version) in $folder"; }

if [ -x "$folder/dockerd" ] && "$folder/dockerd" --version >/dev/null 2>&1; then
    report
    exit 0
fi
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "no $tool here." "The daemon comes out of a Debian package." "Install Docker 26 or newer by hand."
done
mirror=$(debian_mirror)
[ -n "$mirror" ] || fail "apt's sources name no Debian mirror." "The daemon comes out of a Debian package." "Install Docker 26 or newer by hand."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "docker: fetching the daemon of Debian $suite" >&2
debian_lists "$work" "$mirror"
debian_unpack "$work" docker.io containerd

mkdir -p "$(dirname "$folder")"
rm -rf "$folder.new"
mkdir "$folder.new"
mv "$work/root/usr/sbin/dockerd" "$work/root/usr/bin/containerd" "$work/root/usr/bin/containerd-shim-runc-v2" \
    "$work/root/usr/bin/docker-init" "$folder.new"
"$folder.new/dockerd" --version >/dev/null || fail "Debian $suite's dockerd does not run here." "Its libraries are the system's." "Install Docker 26 or newer by hand."
rm -rf "$folder"
mv "$folder.new" "$folder"
report
