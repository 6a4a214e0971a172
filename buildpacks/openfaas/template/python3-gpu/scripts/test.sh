# Runs the function's tests, in a copy of it that is the package `function`, and fails as they fail.
set -eu

rm -rf /function/wheels # installed already
chmod -R a+rX,go-w /function # faas-cli makes folders that only their owner may read
[ "$TEST_ENABLED" != false ] || { echo "skipping tests" && exit 0; }

mkdir -p tested
cp -R /function tested/function
[ -e tested/function/__init__.py ] || : >tested/function/__init__.py
export PYTHONPATH="$PWD/tested${PYTHONPATH:+:$PYTHONPATH}"
cd tested/function

if [ -z "$TEST_COMMAND" ]; then
    if [ -e tox.ini ]; then
        TEST_COMMAND=tox
    elif [ -n "$(find . -name 'test_*.py' -o -name '*_test.py')" ]; then
        TEST_COMMAND=pytest
    else
        echo "no tests" && exit 0
    fi
fi
tool=${TEST_COMMAND%% *}
export PATH="/venv/bin:$PATH"
case $tool in
pytest | tox)
    if ! command -v "$tool" >/dev/null; then
        set --
        if ls /build/wheels/*.whl >/dev/null 2>&1; then set -- --no-index --find-links /build/wheels; fi
        /build/pip/bin/pip --python /venv/bin/python --disable-pip-version-check install --quiet --no-cache-dir "$@" "$tool" || {
            printf 'gpufn: %s\n%s\n%s\n' "the tests cannot be run." "$tool cannot be installed; pip says why above." \
                "Add its wheels to wheels/, give another TEST_COMMAND, or TEST_ENABLED=false." >&2
            exit 1
        }
    fi
    ;;
esac
eval "$TEST_COMMAND"
