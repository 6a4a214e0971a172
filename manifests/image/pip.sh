# How packages are installed here. Sourced by the scripts beside it, in the folder with `wheels`.
# shellcheck shell=sh

fail() { # WHAT WHY HINT
    printf 'gpufn: %s\n%s\n%s\n' "$1" "$2" "$3" >&2
    exit 1
}

# An empty argument is no address.
[ -n "${PIP_INDEX_URL:-}" ] || unset PIP_INDEX_URL
[ -n "${PIP_EXTRA_INDEX_URL:-}" ] || unset PIP_EXTRA_INDEX_URL
[ -n "${PIP_TRUSTED_HOST:-}" ] || unset PIP_TRUSTED_HOST
# For what builds gpufn's own wheel, too.
if ls wheels/*.whl >/dev/null 2>&1; then export PIP_NO_INDEX=1 PIP_FIND_LINKS="$PWD/wheels"; fi

install() { # VENV ARGUMENT...
    python=$1/bin/python
    shift
    pip/bin/pip --python "$python" --disable-pip-version-check --no-input install --no-cache-dir --no-compile "$@" ||
        fail "gpufn's packages cannot be installed." "pip says why above." \
            "An index is needed, or wheels in manifests/image/wheels."
}

compiled() { # ARGUMENT...: what a read-only container could not keep; by content, since times say nothing in an image
    # Some packages bring files that are no Python.
    "$venv/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$@" >/dev/null || true
}
