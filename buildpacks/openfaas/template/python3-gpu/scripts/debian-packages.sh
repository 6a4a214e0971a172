# Debian packages that the build was asked for; without any, the base image stays as it is and no network is needed.
set -eu

packages=$ADDITIONAL_PACKAGE
[ "$CRIU" = true ] && packages="$packages criu"
case $UPGRADE_PACKAGES in true | 1) upgrade=yes ;; *) upgrade= ;; esac
[ -n "$upgrade" ] || [ -n "$(echo $packages)" ] || exit 0

apt-get update -qy
[ -z "$upgrade" ] || apt-get upgrade -qy
[ -z "$(echo $packages)" ] || apt-get install -qy --no-install-recommends $packages
rm -rf /var/lib/apt/lists/*

[ "$CRIU" = true ] || exit 0
found=$(criu --version | sed -n 's/^Version: *//p')
if [ "$(printf '%s\n' 4.1 "$found" | sort -V | head -n 1)" != 4.1 ]; then
    echo "gpufn: the base image's CRIU is too old." >&2
    echo "It is $found; process snapshots need 4.1 or newer." >&2
    echo "Take a BASE_IMAGE of Debian 13 or newer, or leave out the build argument CRIU." >&2
    exit 1
fi
