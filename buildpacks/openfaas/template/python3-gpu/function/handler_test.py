from types import SimpleNamespace

from .handler import handle, load

# Runs while the image is built, and fails the build. The build argument TEST_ENABLED=false leaves it out.


def test_handle():
    answer = handle(event=None, context=SimpleNamespace(model=load("cpu")))
    assert answer == {"statusCode": 200, "body": "Hello from gpufn!"}
