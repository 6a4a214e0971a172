# Makes /venv: the function's packages (requirements.txt, requirements-nodeps.txt) and the shim. Works in the folder
# where these files lie. pip stays outside: an image installs nothing any more.
set -eu

fail() { # WHAT WHY HINT
    printf 'gpufn: %s\n%s\n%s\n' "$1" "$2" "$3" >&2
    exit 1
}

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "the base image has no Python that is new enough." "It has $(python3 --version 2>&1); 3.10 is needed." "Give another with the build argument BASE_IMAGE."
python3 -m venv pip || fail "the base image's Python makes no environments." "It lacks the module venv or ensurepip." "On Debian, the package python3-venv brings both."
# It sees what the base image brings, so that a torch there is not installed once more.
python3 -m venv --system-site-packages --without-pip /venv

wanted() { # FILE: its lines, without those of packages that the base image brings
    [ -e "$1" ] || return 0
    names=$(echo "$FROM_BASE" | tr ', ' '\n\n' | grep . | sed 's/[.]/\\./g; s/[-_]/[-_.]/g' | paste -sd '|' -)
    [ -n "$names" ] || { cat "$1" && return; }
    grep -viE "^[[:space:]]*($names)[[:space:]]*(\$|[][<>=!~;@#(])" "$1" || true # nothing left is fine
}

# The base image's packages count as they are: distributions patch what these need, and leave what they say of it.
cd /venv/lib/python3*/site-packages
site=$PWD
cd - >/dev/null
: >constraints.txt
for name in $(echo "$FROM_BASE" | tr ',' ' '); do
    version=$(python3 -I -c 'import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))' "$name" 2>/dev/null) ||
        fail "the base image does not bring $name." "FROM_BASE says that it does." "Leave it out there, or give another BASE_IMAGE."
    info="$site/$(echo "$name" | tr '.-' '__')-$version.dist-info"
    mkdir "$info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$name" "$version" >"$info/METADATA"
    echo "$info" >>vouched.txt
    echo "$name==$version" >>constraints.txt
done

install() {
    pip/bin/pip --python /venv/bin/python --disable-pip-version-check --no-input install --no-cache-dir --no-compile --constraint constraints.txt --find-links shim "$@"
}

# The same rule as the buildpack's: with wheels beside the handler, packages come from there and from no index.
set --
if ls wheels/*.whl >/dev/null 2>&1; then set -- --no-index --find-links wheels; fi
wanted requirements.txt >wanted.txt
wanted requirements-nodeps.txt >wanted-nodeps.txt
{ install "$@" -r wanted.txt "$GPUFN" && { [ ! -s wanted-nodeps.txt ] || install "$@" --no-deps -r wanted-nodeps.txt; }; } ||
    fail "the function's packages cannot be installed." "pip says why above." "Mend requirements.txt. Where it is gpufn that pip does not find: see shim/README.md of the template."

# In an image runs the shim only. Compiled here, once, since a read-only container cannot keep it.
[ ! -e vouched.txt ] || xargs rm -rf <vouched.txt
/venv/bin/python -I -c 'import pathlib, sys
from adapter.packaging.shim import leave_only_the_shim
leave_only_the_shim(pathlib.Path(sys.argv[1]))' "$site/adapter"
rm -rf /venv/bin/gpufn /venv/bin/[aA]ctivate* /venv/include
/venv/bin/python -m compileall -q -j 0 "$site" >/dev/null || true # some packages bring files that are no Python
