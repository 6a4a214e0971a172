"""After `async with Api` nothing is open, whatever was given up before and whatever the server makes of it."""

import asyncio
import gc
import socket
import ssl
import threading
from contextlib import aclosing, contextmanager

import pytest

from adapter.cluster.api import Api
from adapter.cluster.credentials import Access
from adapter.cluster.resources import PODS
from tests.fakes.api_server import FakeCredentials
from tests.unit.cluster.conftest import self_signed

EVENT = b'{"type":"ADDED","object":{"metadata":{}}}\n'
WATCH = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(EVENT), EVENT)


@contextmanager
def deaf_server(folder, answer):
    """Over TLS it gives one caller an `answer` (None: it does not even say hello), and hears nothing from then on. What
    leads there, and what is set once the caller has asked."""
    cert_file, key_file = self_signed(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_file, key_file)
    asked, over = threading.Event(), threading.Event()

    def serve():
        connection, _ = listener.accept()
        if answer is not None:
            connection = context.wrap_socket(connection, server_side=True)
        with connection:
            connection.recv(2**16)
            if answer:
                connection.sendall(answer)
            asked.set()
            over.wait()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            tls = ssl.create_default_context(cafile=cert_file)
            yield Access(f"https://127.0.0.1:{listener.getsockname()[1]}", "default", tls), asked
        finally:
            over.set()
            thread.join()


def open_sockets():
    """Those of this loop's transports."""
    loop = asyncio.get_running_loop()
    # By type: to ask some objects of other libraries for their class warns.
    transports = [found for found in gc.get_objects() if issubclass(type(found), asyncio.Transport)]
    sockets = [getattr(each, "_sock", None) for each in transports if getattr(each, "_loop", None) is loop]
    return [each for each in sockets if each is not None and each.fileno() != -1]


@pytest.mark.parametrize("answer", [None, b"", WATCH], ids=["greeted", "answered", "told"])
def test_nothing_of_a_watch_stays_open_that_was_given_up_before_it_was(tmp_path, answer):
    async def scene():
        told = asyncio.Event()

        async def watch():
            async with aclosing(api.watch(PODS.path(), "1", timeout_s=60, silence_s=60)) as events:
                async for _ in events:
                    told.set()

        with deaf_server(tmp_path, answer) as (access, asked):
            async with Api(FakeCredentials(access)) as api:
                task = asyncio.create_task(watch())
                await asyncio.to_thread(asked.wait)
                if answer:
                    await told.wait()
                assert open_sockets()
                task.cancel()
                await asyncio.wait([task])
            assert open_sockets() == []

    asyncio.run(asyncio.wait_for(scene(), 10))
