# Installs gpufn for a cluster: what it needs into VENV, itself below OWN, to be laid over it.
#   sh install.sh VENV OWN
set -eu
venv=$1 own=$2

fail() { # WHAT WHY HINT
    printf 'gpufn: %s\n%s\n%s\n' "$1" "$2" "$3" >&2
    exit 1
}

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "the base image has no Python that is new enough." "It has $(python3 --version 2>&1); 3.10 is needed." "Give another with the build argument BASE."
python3 -m venv pip || fail "the base image's Python makes no environments." "It lacks the module venv or ensurepip." "On Debian, the package python3-venv brings both."
python3 -m venv --without-pip "$venv"

# An empty argument is no address.
[ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL
[ -n "$PIP_EXTRA_INDEX_URL" ] || unset PIP_EXTRA_INDEX_URL
[ -n "$PIP_TRUSTED_HOST" ] || unset PIP_TRUSTED_HOST
# For what builds gpufn's own wheel, too.
if ls wheels/*.whl >/dev/null 2>&1; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/build/wheels; fi
pip/bin/pip --python "$venv/bin/python" --disable-pip-version-check --no-input install --no-cache-dir --no-compile \
    --constraint requirements-dev.lock ".[$EXTRAS]" ||
    fail "gpufn's packages cannot be installed." "pip says why above." "An index is needed, or wheels in manifests/image/wheels."

# A read-only container cannot keep what Python compiles. By content: times say nothing in an image.
"$venv/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$venv/lib" >/dev/null || true # some packages bring files that are no Python
# Nothing is installed or started from here any more but `python -m`.
find "$venv/bin" -mindepth 1 ! -name 'python*' -delete
rm -rf "$venv/include"

# Itself apart, so that its layer alone is new when only it is.
site=$(cd "$venv" && echo lib/python3*/site-packages)
mkdir -p "$own/$site"
mv "$venv/$site"/adapter "$venv/$site"/gpufn-*.dist-info "$own/$site"
find "$venv" "$own" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
