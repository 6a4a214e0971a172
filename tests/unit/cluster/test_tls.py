import asyncio
import os
import ssl

import pytest

from adapter.cluster.tls import ServingTls
from tests.unit.cluster.conftest import self_signed


async def handshake(tls, trusted):
    """The certificate that a client is shown; it trusts `trusted` alone."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=tls.context)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=ssl.create_default_context(cafile=trusted))
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return ssl.DER_cert_to_PEM_cert(shown)
    finally:
        server.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def test_the_certificate_of_the_moment_is_shown_without_a_restart(folder):
    async def scene():
        tls = ServingTls(folder)
        for _ in range(2):
            cert_file, _ = self_signed(folder)
            assert tls.look()
            assert await handshake(tls, cert_file) == cert_file.read_text()

    asyncio.run(scene())


def test_without_a_certificate_no_handshake_succeeds_and_that_is_known(folder):
    async def scene():
        tls = ServingTls(folder)
        assert not tls.look()
        assert not tls.loaded
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await handshake(tls, None)

    asyncio.run(scene())


def test_half_of_a_new_pair_changes_nothing(folder, tmp_path_factory):
    async def scene():
        tls = ServingTls(folder)
        cert_file, key_file = self_signed(folder)
        assert tls.look()
        shown = cert_file.read_text()
        old_cert = tmp_path_factory.mktemp("old") / "ca.crt"
        old_cert.write_text(shown)
        other_cert, other_key = self_signed(tmp_path_factory.mktemp("other"))
        os.replace(other_cert, cert_file)
        assert not tls.look()
        assert await handshake(tls, old_cert) == shown
        os.replace(other_key, key_file)
        assert tls.look()
        assert await handshake(tls, cert_file) != shown

    asyncio.run(scene())


def test_files_that_did_not_change_are_not_read_again(folder):
    tls = ServingTls(folder)
    self_signed(folder)
    assert tls.look()
    assert not tls.look()
