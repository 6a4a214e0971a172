"""Our client against a real API server: the scenes that the fake plays too, and what only the real one can show."""

import asyncio
import signal
import uuid

import pytest

from adapter.cluster.api import Api, Pace
from adapter.cluster.certificates import signed_by
from adapter.cluster.credentials import Credentials
from adapter.cluster.informer import Informer, Rhythm
from adapter.cluster.resources import CONFIG_MAPS, MUTATING_WEBHOOKS, NAMESPACES, SECRETS
from adapter.controller.certificate_keeper import CertificateKeeper, _pair
from adapter.errors import Conflict, Unavailable
from adapter.keys import AGENT_NAMESPACE, SYSTEM_NAMESPACE
from tests.contract.kubernetes.scenes import ApiScenes, body, data
from tests.fakes.replicas import until


@pytest.fixture(scope="module", autouse=True)
def kubeconfig(control_plane):
    TestReal.kubeconfig = control_plane.kubeconfig
    return control_plane.kubeconfig


class TestReal(ApiScenes):
    kubeconfig = None

    def play(self, scene):
        async def played():
            async with Api(Credentials(self.kubeconfig), pace=Pace(per_s=200, burst=400)) as api:
                namespace = f"test-{uuid.uuid4().hex[:8]}"
                await api.create(NAMESPACES.path(), NAMESPACES.body(namespace))
                try:
                    await asyncio.wait_for(scene(api, namespace), 120)
                finally:
                    await api.delete(NAMESPACES.path(name=namespace))

        asyncio.run(played())

    def test_a_version_that_is_too_old_is_gone(self, control_plane):
        """A server that has just started knows of nothing that was before."""
        server = control_plane.components["kube-apiserver"]
        server.kill()
        server.start()

        async def ready():
            await until(control_plane.is_ready, 60)

        asyncio.run(ready())
        super().test_a_version_that_is_too_old_is_gone()

    def test_a_field_of_another_manager_is_taken_only_by_force(self):
        async def scene(api, namespace):
            path = CONFIG_MAPS.path(namespace, "a")
            await api.apply(path, body("a", namespace))
            async with Api(Credentials(self.kubeconfig), field_manager="another") as other:
                with pytest.raises(Conflict):
                    await other.apply(path, body("a", namespace, x="2"))
                assert data(await other.apply(path, body("a", namespace, x="2"), force=True)) == "2"

        self.play(scene)

    def test_a_cluster_whose_certificate_is_not_known_is_not_talked_to(self, tmp_path, control_plane):
        text = control_plane.kubeconfig.read_text()
        lines = [line for line in text.splitlines() if "certificate-authority" not in line]
        assert len(lines) < len(text.splitlines()), "the kubeconfig names no CA on a line of its own"
        (tmp_path / "kubeconfig").write_text("\n".join(lines))

        async def scene():
            async with Api(Credentials(tmp_path / "kubeconfig")) as api:
                with pytest.raises(Unavailable) as caught:
                    await api.get("/version")
                assert caught.value.code == "api-untrusted"

        asyncio.run(scene())

    @pytest.mark.parametrize("how", ["killed", "stopped"])
    def test_an_informer_goes_on_when_the_api_server_was_away(self, control_plane, how):
        server = control_plane.components["kube-apiserver"]

        async def scene(api, namespace):
            rhythm = Rhythm(silence_s=3, first_pause_s=0.05, pause_limit_s=0.5)
            informer = Informer(api, CONFIG_MAPS.path(namespace), data, rhythm=rhythm)
            running = asyncio.ensure_future(informer.run())
            await informer.synced.wait()
            failures = informer.failures
            if how == "killed":
                server.kill()
                await until(lambda: informer.failures > failures)
                server.start()
            else:
                server.send(signal.SIGSTOP)
                await until(lambda: informer.failures > failures)
                server.send(signal.SIGCONT)
            await until(control_plane.is_ready, 60)
            await api.create(CONFIG_MAPS.path(namespace), body("a", namespace))
            await until(lambda: informer.get(f"{namespace}/a") == "1", 60)
            running.cancel()

        self.play(scene)

    def test_certificates_are_kept_where_the_api_server_looks(self, control_plane):
        async def scene(api, namespace):
            for name in (SYSTEM_NAMESPACE, AGENT_NAMESPACE):
                await api.apply(NAMESPACES.path(name=name), NAMESPACES.body(name))
            hook = {
                "name": "pods.gpufn.dev",
                "clientConfig": {"service": {"name": "gpufn-webhook", "namespace": SYSTEM_NAMESPACE}},
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "failurePolicy": "Ignore",
            }
            path = MUTATING_WEBHOOKS.path(name="gpufn")
            await api.apply(path, MUTATING_WEBHOOKS.body("gpufn", webhooks=[hook]))
            keeper = CertificateKeeper(api)
            for _ in range(2):
                await keeper.reconcile("gpufn")
            secret = await api.get(SECRETS.path(SYSTEM_NAMESPACE, "gpufn-webhook-tls"))
            trusted = await api.get(CONFIG_MAPS.path(AGENT_NAMESPACE, "gpufn-ca"))
            assert signed_by(_pair(secret, "tls.crt", "tls.key").certificate, trusted["data"]["ca.crt"].encode())
            [patched] = (await api.get(path))["webhooks"]
            assert patched["clientConfig"]["caBundle"]
            await api.delete(path)
            for name in (SYSTEM_NAMESPACE, AGENT_NAMESPACE):
                await api.delete(NAMESPACES.path(name=name))
            await asyncio.to_thread(control_plane.kubectl, "wait", "namespace", SYSTEM_NAMESPACE, AGENT_NAMESPACE,
                                    "--for=delete", "--timeout=60s")  # fmt: skip

        self.play(scene)
