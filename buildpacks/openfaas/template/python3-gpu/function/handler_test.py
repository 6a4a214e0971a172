from . import handler

# Runs while the image is built, and fails the build. The build argument TEST_ENABLED=false leaves it out.
# Change it rather than remove it: faas-cli puts the template's files where the function has none of that name.


def test_handle():
    assert callable(handler.handle)
