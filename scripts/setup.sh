#!/bin/sh
# Makes the development environment: .venv with gpufn, every extra and the tools. `make setup` runs it.
#
# A bare Debian with python3 is enough; python3-venv is installed with apt-get where this runs as root.
# Nothing outside the repository changes otherwise.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python

fail() {
    echo "setup: $1" >&2
    exit 1
}

install_packages() {
    command -v apt-get >/dev/null || fail "missing: $*. Install what provides them here, then run make setup again."
    [ "$(id -u)" = 0 ] || fail "missing: $*. Run as root: apt-get install $*, then make setup again."
    echo "setup: installing $*" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

find_uv() {
    if [ -x .venv/bin/uv ]; then
        uv=.venv/bin/uv
    elif command -v uv >/dev/null; then
        uv=$(command -v uv)
    else
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip -q
        "$python" -m pip install --quiet --disable-pip-version-check uv
        uv=.venv/bin/uv
    fi
}

command -v python3 >/dev/null || install_packages python3 python3-venv
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed: $(python3 --version) is too old."
if ! "$python" -c '' 2>/dev/null; then
    python3 -c 'import ensurepip' 2>/dev/null || install_packages python3-venv
    python3 -m venv --clear .venv
fi
find_uv
echo "setup: installing gpufn and its tools into .venv (about 6 GB: torch is in it, for the tests of weight snapshots)" >&2
"$uv" pip install --quiet --python "$python" --constraint requirements-dev.lock --editable '.[all,postgres,agent,ledger,provider,convert,dev]'
touch .venv/installed
