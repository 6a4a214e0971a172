# Installs gpufn below OWN, as it will lie in VENV of the image.
#   sh own.sh OWN VENV
set -eu
own=$1 venv=$2
. ./pip.sh

site=$(cd "$venv" && echo lib/python3*/site-packages)
install "$venv" --no-deps --target "$own/$site" .
rm -rf "$own/$site/bin"
compiled -s "$own" -p "$venv" "$own/$site"
find "$(dirname "$own")" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
