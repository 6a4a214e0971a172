"""Snapshots beside images are fetched before a start, and nothing about them can hinder one."""

import asyncio
import logging
import socket

from adapter.hosts.artifacts import fetch_snapshots

DIGEST = "sha256:" + "0" * 64


def fetch(image, folder, **options):
    return asyncio.run(fetch_snapshots(image, folder, "fn.openfaas-fn", "default", **options))


def test_a_registry_that_is_down_hinders_nothing_and_is_said(tmp_path, caplog):
    with socket.socket() as probe, caplog.at_level(logging.WARNING):
        probe.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        assert fetch(f"{address}/fn@{DIGEST}", tmp_path / "snapshots") == 0
    [record] = caplog.records
    assert record.fields["image"] == f"{address}/fn@{DIGEST}"
    assert record.fields["why"]


def test_one_that_hangs_is_waited_for_no_longer_than_the_limit(tmp_path, caplog):
    with socket.socket() as listener, caplog.at_level(logging.WARNING):
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert fetch(f"{address}/fn@{DIGEST}", tmp_path / "snapshots", limit_s=0.5) == 0
    [record] = caplog.records
    assert "not done" in record.fields["why"]
