import base64
import json

import pytest

from adapter.errors import ConfigError
from adapter.registry.credentials import Credentials, find_credentials
from adapter.registry.reference import Reference

IMAGE = Reference.parse("registry.example:5000/team/fn:1")
SECRET = "s3cret-word"


def entry(user="me", password=SECRET):
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def environ(tmp_path):
    return {"HOME": str(tmp_path), "PATH": str(tmp_path / "bin")}


def write(path, **config):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def helper(tmp_path, script, name="keys"):
    program = tmp_path / "bin" / f"docker-credential-{name}"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_without_any_file_there_are_none(environ):
    assert find_credentials(IMAGE, environ) is None


@pytest.mark.parametrize(
    "key", ["registry.example:5000", "https://registry.example:5000", "https://registry.example:5000/v1/"]
)
def test_dockers_file_is_read_whatever_form_the_key_has(environ, tmp_path, key):
    write(tmp_path / ".docker/config.json", auths={key: entry()})
    assert find_credentials(IMAGE, environ) == Credentials("me", SECRET)


def test_another_registrys_are_never_given(environ, tmp_path):
    write(tmp_path / ".docker/config.json", auths={"registry.example": entry(), "registry.example:5001": entry()})
    assert find_credentials(IMAGE, environ) is None


def test_docker_hub_has_its_own_key(environ, tmp_path):
    write(tmp_path / ".docker/config.json", auths={"https://index.docker.io/v1/": entry()})
    assert find_credentials(Reference.parse("debian"), environ) == Credentials("me", SECRET)


def test_docker_config_names_the_folder(environ, tmp_path):
    write(tmp_path / "elsewhere/config.json", auths={IMAGE.host: entry()})
    assert find_credentials(IMAGE, {**environ, "DOCKER_CONFIG": str(tmp_path / "elsewhere")}) == Credentials(
        "me", SECRET
    )


def test_podmans_file_is_read_and_the_closest_repository_wins(environ, tmp_path):
    auths = {IMAGE.host: entry("host"), f"{IMAGE.host}/team": entry("team"), f"{IMAGE.host}/other": entry("other")}
    write(tmp_path / "run/containers/auth.json", auths=auths)
    found = find_credentials(IMAGE, {**environ, "XDG_RUNTIME_DIR": str(tmp_path / "run")})
    assert found == Credentials("team", SECRET)


def test_a_named_file_is_the_only_one(environ, tmp_path):
    write(tmp_path / ".docker/config.json", auths={IMAGE.host: entry()})
    write(tmp_path / "auth.json")
    assert find_credentials(IMAGE, {**environ, "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}) is None


def test_an_identity_token_is_kept_apart(environ, tmp_path):
    write(tmp_path / ".docker/config.json", auths={IMAGE.host: {**entry("me", ""), "identitytoken": SECRET}})
    assert find_credentials(IMAGE, environ) == Credentials("me", "", SECRET)


@pytest.mark.parametrize("config", [{"credHelpers": {IMAGE.host: "keys"}}, {"credsStore": "keys"}])
def test_a_helper_is_asked_for_this_registry(environ, tmp_path, config):
    write(tmp_path / ".docker/config.json", **config)
    answer = json.dumps({"Username": "me", "Secret": SECRET})
    helper(tmp_path, f'read -r asked <&0 || true; [ "$1 $asked" = "get {IMAGE.host}" ] && echo \'{answer}\'')
    assert find_credentials(IMAGE, environ) == Credentials("me", SECRET)


def test_a_helper_may_have_an_identity_token(environ, tmp_path):
    write(tmp_path / ".docker/config.json", credsStore="keys")
    helper(tmp_path, f"""echo '{json.dumps({"Username": "<token>", "Secret": SECRET})}'""")
    assert find_credentials(IMAGE, environ) == Credentials(identity_token=SECRET)


def test_a_helper_may_have_nothing(environ, tmp_path):
    write(tmp_path / ".docker/config.json", credsStore="keys")
    helper(tmp_path, "echo credentials not found in native keychain; exit 1")
    assert find_credentials(IMAGE, environ) is None


@pytest.mark.parametrize(
    "script",
    [f"echo {SECRET}; exit 3", f"echo {SECRET}", f"""echo '["{SECRET}"]'""", f"""echo '{{"Secret":"{SECRET}"}}'"""],
)
def test_a_helper_that_fails_is_named_and_its_words_are_not_repeated(environ, tmp_path, script):
    write(tmp_path / ".docker/config.json", credsStore="keys")
    helper(tmp_path, script)
    with pytest.raises(ConfigError) as caught:
        find_credentials(IMAGE, environ)
    assert caught.value.code == "credential-helper-failed"
    assert "docker-credential-keys" in caught.value.message
    assert SECRET not in f"{caught.value.message} {caught.value.why} {caught.value.hint}"


@pytest.mark.parametrize("name", ["missing", "../../bin/sh", ""])
def test_a_helper_is_a_program_of_that_name_on_the_path(environ, tmp_path, name):
    write(tmp_path / ".docker/config.json", credHelpers={IMAGE.host: name})
    with pytest.raises(ConfigError):
        find_credentials(IMAGE, environ)


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", json.dumps({"auths": {IMAGE.host: {"auth": SECRET + "!"}}}), "[" * 100_000]
)
def test_a_damaged_file_is_named_and_not_quoted(environ, tmp_path, text):
    path = tmp_path / ".docker/config.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_credentials(IMAGE, environ)
    assert str(path) in caught.value.message
    assert SECRET not in f"{caught.value.message} {caught.value.why} {caught.value.hint}"


def test_no_password_is_in_what_is_printed_of_them():
    assert SECRET not in repr(Credentials("me", SECRET, SECRET))
