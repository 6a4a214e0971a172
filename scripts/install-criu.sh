#!/bin/sh
# Puts a private CRIU into one folder, touching nothing else of the system.
#
# Debian 12 ships CRIU 3.17, which cannot parse the vDSO of kernels 6.x; the next
# release ships 4.1. This fetches that package and the libraries it links against
# with apt's own signature checks, and unpacks them without installing anything.
#
#   scripts/install-criu.sh [FOLDER]      default: ~/.local/share/gpufn/criu
set -eu

folder=${1:-${XDG_DATA_HOME:-$HOME/.local/share}/gpufn/criu}
suite=trixie
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

if [ -x "$folder/criu" ] && "$folder/criu" --version >/dev/null 2>&1; then
    echo "criu: $("$folder/criu" --version | head -n 1) in $folder"
    exit 0
fi
for tool in apt-get apt-cache dpkg; do
    command -v "$tool" >/dev/null || {
        echo "install-criu: no $tool here: install CRIU 4.1 or newer with this system's packages" >&2
        exit 1
    }
done

# The mirror is the one this machine already uses for Debian's own suites.
mirror=$(sed -n -e 's/^URIs: *\([^ ]*\).*/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null | grep -v security | grep '/debian/*$' | head -n 1)
[ -n "$mirror" ] || mirror=$(sed -n 's/^deb  *\(\[[^]]*\] *\)\{0,1\}\([^ ]*\) .*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | grep '/debian/*$' | head -n 1)
[ -n "$mirror" ] || {
    echo "install-criu: apt's sources name no Debian mirror: install CRIU 4.1 or newer by hand" >&2
    exit 1
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work/lists/partial" "$work/debs" "$work/root"
echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/sources.list"
apt_options="-o Dir::Etc::sourcelist=$work/sources.list -o Dir::Etc::sourceparts=- -o Dir::State::Lists=$work/lists -o Dir::Cache=$work -o Dir::State::status=/dev/null -o APT::Sandbox::User=root"

echo "criu: reading the package list of Debian $suite" >&2
# shellcheck disable=SC2086  # the options are words
apt-get $apt_options update -qq
# shellcheck disable=SC2086
packages=$(apt-cache $apt_options depends --recurse --no-recommends --no-suggests --no-conflicts \
    --no-breaks --no-replaces --no-enhances criu | grep '^[a-z0-9]' | sort -u)
echo "criu: fetching $(echo "$packages" | wc -l) packages" >&2
# shellcheck disable=SC2086
(cd "$work/debs" && apt-get $apt_options download -qq $packages)
for deb in "$work"/debs/*.deb; do
    dpkg -x "$deb" "$work/root"
done
rm -rf "$work/root/usr/share" "$work/root/var" "$work/root/etc"

mkdir -p "$(dirname "$folder")"
rm -rf "$folder.new"
mv "$work/root" "$folder.new"
libraries="\$here/usr/lib/$(uname -m)-linux-gnu"
loader=$(cd "$folder.new" && find . -name 'ld-linux*.so.*' | head -n 1 | cut -c3-)
cat >"$folder.new/criu" <<WRAPPER
#!/bin/sh
# Run at each restore: no process is started for what the shell can do. By a link is the rare case.
here=\$0
[ ! -L "\$here" ] || here=\$(readlink -f "\$here")
here=\${here%/*}
exec "\$here/$loader" --library-path "$libraries" "\$here/usr/sbin/criu" "\$@"
WRAPPER
chmod 755 "$folder.new/criu"
"$folder.new/criu" --version >/dev/null
rm -rf "$folder"
mv "$folder.new" "$folder"
echo "criu: $("$folder/criu" --version | head -n 1) in $folder"
