#!/bin/sh
# Puts a private CRIU into one folder, touching nothing else of the system.
#
# Debian 12 ships CRIU 3.17, which cannot parse the vDSO of kernels 6.x; the next
# release ships 4.1. This fetches that package and the libraries it links against
# with apt's own signature checks, and unpacks them without installing anything.
#
#   scripts/install-criu.sh [FOLDER]      default: ~/.local/share/gpufn/criu
set -eu
. "$(dirname "$0")/debian.sh"

folder=${1:-${XDG_DATA_HOME:-$HOME/.local/share}/gpufn/criu}

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

mirror=$(debian_mirror)
[ -n "$mirror" ] || {
    echo "install-criu: apt's sources name no Debian mirror: install CRIU 4.1 or newer by hand" >&2
    exit 1
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "criu: reading the package list of Debian $suite" >&2
debian_lists "$work" "$mirror"
packages=$(debian_needs criu)
echo "criu: fetching $(echo "$packages" | wc -l) packages" >&2
# shellcheck disable=SC2086  # one word a package
debian_unpack "$work" $packages

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
