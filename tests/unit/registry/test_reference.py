import pytest
from hypothesis import given, strategies as st

from adapter.errors import ConfigError
from adapter.registry.reference import Reference

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("debian", ("docker.io", "library/debian", "latest", "")),
        ("team/fn:2", ("docker.io", "team/fn", "2", "")),
        ("docker.io/debian", ("docker.io", "library/debian", "latest", "")),
        ("ghcr.io/team/fn", ("ghcr.io", "team/fn", "latest", "")),
        ("localhost/fn:1", ("localhost", "fn", "1", "")),
        ("registry:5000/a/b/c:v1.2", ("registry:5000", "a/b/c", "v1.2", "")),
        ("[::1]:5000/fn:1", ("[::1]:5000", "fn", "1", "")),
        (f"ghcr.io/team/fn@{DIGEST}", ("ghcr.io", "team/fn", "", DIGEST)),
        (f"ghcr.io/team/fn:1@{DIGEST}", ("ghcr.io", "team/fn", "1", DIGEST)),
    ],
)
def test_references_are_read_as_docker_reads_them(text, parsed):
    found = Reference.parse(text)
    assert (found.host, found.repository, found.tag, found.digest) == parsed
    assert Reference.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    ["", "/", ":", "@", "Team/fn", "https://ghcr.io/fn", "ghcr.io/../fn", "fn:", "fn:ta g", "fn@sha256:12", "a/b?c", "fn@md5:"
     + "a" * 32, "-host.x/fn", "x" * 2000, "ghcr.io/fn\n", "host:99999999/fn"],
)  # fmt: skip
def test_what_is_no_reference_is_refused_with_the_part(text):
    with pytest.raises(ConfigError) as caught:
        Reference.parse(text)
    assert caught.value.code == "bad-reference"
    assert caught.value.why
    assert caught.value.hint


@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        found = Reference.parse(text)
    except ConfigError:
        return
    assert Reference.parse(str(found)) == found


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1:5000", True), ("localhost", True), ("localhost:5000", True), ("[::1]:5000", True), ("[::1]", True),
     ("10.0.0.1:5000", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example:80", False)],
)  # fmt: skip
def test_plain_http_is_for_this_machine_only(host, local):
    assert Reference.parse(f"{host}/fn").is_local == local


def test_docker_hub_is_served_by_another_host():
    assert Reference.parse("debian").api_host == "registry-1.docker.io"
