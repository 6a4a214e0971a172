#!/bin/sh
# Puts a wheel of this checkout into an OpenFaaS template, so that images get this gpufn and ask no index for it.
#
#   scripts/template-wheel.sh TEMPLATE      e.g. template/python3-gpu, after `faas-cli template pull`
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
[ $# = 1 ] || { sed -n 's/^# \{0,1\}//; 2,4p' "$0" >&2 && exit 2; }
template=$1
if [ ! -e "$template/shim/README.md" ]; then
    echo "template-wheel: $template is no gpufn template." >&2
    echo "It has no folder shim." >&2
    echo "Pull it first: faas-cli template pull $here" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -x "$here/.venv/bin/uv" ]; then
    "$here/.venv/bin/uv" build --quiet --wheel --out-dir "$work" "$here"
else
    python3 -m pip wheel --quiet --no-deps --wheel-dir "$work" "$here"
fi
rm -f "$template"/shim/*.whl
cp "$work"/*.whl "$template/shim/"
ls "$template"/shim/*.whl
