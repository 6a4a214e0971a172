import asyncio
import json
import os
import ssl
import sys
import textwrap

import pytest
import yaml

from adapter.cluster import credentials as module
from adapter.cluster.credentials import Credentials
from adapter.errors import ConfigError
from tests.unit.cluster.conftest import self_signed


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path):
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def kubeconfig(folder, name="kubeconfig", context="one", cluster=None, **user):
    cert_file, _ = self_signed(folder)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "c", "cluster": cluster or {"server": "https://there", "certificate-authority": str(cert_file)}}
        ],
        "users": [{"name": "u", "user": user}],
        "contexts": [
            {"name": context, "context": {"cluster": "c", "user": "u", "namespace": f"of-{context}"}},
            {"name": "other", "context": {"cluster": "c", "user": "u"}},
        ],
        "current-context": context,
    }
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


def plugin(folder, body):
    """An exec plugin that counts how often it ran."""
    program = folder / "plugin"
    program.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body))
    program.chmod(0o755)
    return {
        "exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program), "interactiveMode": "Never"}
    }


PRINTS = """
    import json, pathlib, sys
    ran = pathlib.Path(sys.argv[0] + ".ran")
    ran.write_text(ran.read_text() + "x" if ran.exists() else "x")
    token = f"token-{len(ran.read_text())}"
    print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token}}))
"""


def access(credentials, **options):
    return asyncio.run(credentials.access(**options))


def test_a_context_is_who_and_where_and_its_server_is_verified(tmp_path):
    found = access(Credentials(kubeconfig(tmp_path, token="s3cret")))
    assert (found.url, found.namespace) == ("https://there", "of-one")
    assert found.headers == {"Authorization": "Bearer s3cret"}
    assert found.tls.verify_mode == ssl.CERT_REQUIRED
    assert found.tls.check_hostname
    assert "s3cret" not in repr(found)


def test_another_context_is_taken_by_its_name(tmp_path):
    assert access(Credentials(kubeconfig(tmp_path, token="t"), "other")).namespace == "default"
    with pytest.raises(ConfigError) as caught:
        access(Credentials(kubeconfig(tmp_path, token="t"), "none"))
    assert caught.value.code == "no-cluster"


def test_several_files_are_one_configuration(tmp_path):
    (tmp_path / "more").mkdir()
    files = [kubeconfig(tmp_path, token="first"), kubeconfig(tmp_path / "more", context="two", token="second")]
    environ = {"KUBECONFIG": os.pathsep.join(map(str, files))}
    assert access(Credentials(None, "two", environ)).namespace == "of-two"


def test_a_client_certificate_is_shown(tmp_path):
    cert_file, key_file = self_signed(tmp_path)
    user = {"client-certificate": str(cert_file), "client-key": str(key_file)}
    assert not access(Credentials(kubeconfig(tmp_path, **user))).headers


def test_a_plugin_is_asked_once_and_again_when_its_token_is_refused(tmp_path):
    async def scene():
        credentials = Credentials(kubeconfig(tmp_path, **plugin(tmp_path, PRINTS)))
        first = await credentials.access()
        assert await credentials.access() is first
        assert first.headers == {"Authorization": "Bearer token-1"}
        answers = await asyncio.gather(*(credentials.access(refused=first) for _ in range(3)))
        assert {answer.headers["Authorization"] for answer in answers} == {"Bearer token-2"}

    asyncio.run(scene())


@pytest.mark.parametrize("body", ["import sys; print('s3cret'); sys.exit(1)", "print('s3cret')", "print('{}')"])
def test_a_plugin_that_fails_is_named_and_not_quoted(tmp_path, body):
    with pytest.raises(ConfigError) as caught:
        access(Credentials(kubeconfig(tmp_path, **plugin(tmp_path, body))))
    assert "program" in caught.value.why
    assert "s3cret" not in caught.value.to_text()


def test_a_token_in_a_file_is_read_anew_when_it_was_rotated(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FRESH_S", 0.0)
    cert_file, _ = self_signed(tmp_path)
    token = tmp_path / "token"
    token.write_text("old")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    from kubernetes.config import incluster_config

    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(cert_file))
    (tmp_path / "namespace").write_text("gpufn-system\n")
    monkeypatch.setattr(module, "_POD_NAMESPACE", tmp_path / "namespace")

    async def scene():
        credentials = Credentials()
        first = await credentials.access()
        assert (first.url, first.namespace) == ("https://10.0.0.1:443", "gpufn-system")
        assert first.headers["Authorization"].lower() == "bearer old"
        token.write_text("new")
        again = await credentials.access(refused=first)
        assert again.headers["Authorization"].lower() == "bearer new"

    asyncio.run(scene())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "apiVersion: v1\n", json.dumps({"current-context": "x", "contexts": []})]
)
def test_a_file_that_is_no_kubeconfig_is_named(tmp_path, text):
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        access(Credentials(path))
    assert (caught.value.code, str(path) in caught.value.message) == ("no-cluster", True)


def test_no_error_quotes_a_token_of_a_file_that_is_wrong(tmp_path):
    path = kubeconfig(tmp_path, token="s3cret")
    config = yaml.safe_load(path.read_text())
    for users in ([{"name": "u", "token": "s3cret"}], [{"user": {"token": "s3cret"}}], "s3cret"):
        path.write_text(yaml.safe_dump({**config, "users": users}))
        with pytest.raises(ConfigError) as caught:
            access(Credentials(path))
        assert "s3cret" not in caught.value.to_text()


def test_without_any_configuration_that_is_said():
    with pytest.raises(ConfigError, match="No Kubernetes cluster is configured"):
        access(Credentials())
