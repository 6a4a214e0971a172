# Makes VENV: an environment with all that gpufn needs on a cluster, without gpufn; and LAYER, the same for the image.
#   sh packages.sh VENV LAYER
set -eu
venv=$1 layer=$2
. ./pip.sh

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "the base image has no Python that is new enough." "It has $(python3 --version 2>&1); 3.10 is needed." \
        "Give another with the build argument BASE."
python3 -m venv pip ||
    fail "the base image's Python makes no environments." "It lacks the module venv or ensurepip." \
        "On Debian, the package python3-venv brings both."
python3 -m venv --without-pip "$venv"

PYTHONPATH=$(echo pip/lib/python3*/site-packages) python3 requirements.py pyproject.toml "$EXTRAS" >requirements.txt
install "$venv" --constraint requirements-dev.lock --requirement requirements.txt
# Nothing is installed or started from here any more but `python -m`.
find "$venv/bin" -mindepth 1 ! -name 'python*' -delete
rm -rf "$venv/include"
compiled "$venv/lib"
mkdir -p "$(dirname "$layer")"
cp -al "$venv" "$layer"
find "$(dirname "$layer")" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
