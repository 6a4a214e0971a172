import datetime as dt
import ssl

import pytest
from cryptography import x509
from hypothesis import given, settings, strategies as st

from adapter.cluster.certificates import (
    AUTHORITY_LIFE,
    SERVING_LIFE,
    Pair,
    bundle_of,
    issue,
    make_authority,
    names_of,
    renew_at,
    signed_by,
    why_not,
)

NOW = dt.datetime(2026, 11, 25, tzinfo=dt.timezone.utc)
NAMES = ["gpufn-webhook.gpufn-system.svc", "gpufn-webhook"]


def test_a_client_that_trusts_the_authority_accepts_what_it_signed(tmp_path):
    now = dt.datetime.now(dt.timezone.utc)
    authority = make_authority(now)
    pair = issue(authority, NAMES, now)
    (tmp_path / "tls.crt").write_bytes(pair.certificate)
    (tmp_path / "tls.key").write_bytes(pair.key)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    asking = ssl.create_default_context(cadata=authority.certificate.decode())
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    for name in NAMES:
        shake_hands(serving, asking, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(serving, asking, "gpufn-ledger.gpufn-system.svc")
    with pytest.raises(ssl.SSLCertVerificationError):
        other = ssl.create_default_context(cadata=make_authority(now).certificate.decode())
        shake_hands(serving, other, NAMES[0])


def shake_hands(serving, asking, name):
    """All in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(to_client, to_server, server_hostname=name)
    server = serving.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_what_cannot_be_used_says_why():
    authority = make_authority(NOW)
    pair = issue(authority, NAMES, NOW)
    assert why_not(pair, NOW) == ""
    assert why_not(pair, NOW + SERVING_LIFE) == "expired"
    assert why_not(pair, NOW - dt.timedelta(hours=1)) == "expired"
    assert why_not(Pair(pair.certificate, authority.key), NOW) == "mismatched"
    for certificate, key in ((b"", pair.key), (pair.certificate, b""), (b"x", b"y")):
        assert why_not(Pair(certificate, key), NOW) == "unreadable"


def test_a_certificate_ends_no_later_than_its_authority():
    authority = make_authority(NOW)
    pair = issue(authority, NAMES, NOW + AUTHORITY_LIFE - dt.timedelta(days=1))
    assert why_not(pair, NOW + AUTHORITY_LIFE) == "expired"
    assert names_of(pair.certificate) == frozenset(NAMES)


def test_a_bundle_has_each_living_authority_once():
    old, new = make_authority(NOW), make_authority(NOW + AUTHORITY_LIFE / 2)
    both = bundle_of([new.certificate, old.certificate, new.certificate, b"garbage"], NOW + AUTHORITY_LIFE / 2)
    assert len(x509.load_pem_x509_certificates(both)) == 2
    assert bundle_of([both], NOW + AUTHORITY_LIFE) == new.certificate
    pair = issue(old, NAMES, NOW)
    assert signed_by(pair.certificate, both)
    assert not signed_by(pair.certificate, new.certificate)
    assert not signed_by(pair.certificate, b"")


@settings(max_examples=20)
@given(st.timedeltas(dt.timedelta(0), AUTHORITY_LIFE * 2 / 3))
def test_what_was_signed_before_the_authority_is_renewed_is_renewed_before_that_authority_ends(age):
    authority = make_authority(NOW)
    pair = issue(authority, NAMES, NOW + age)
    assert renew_at(pair.certificate) < NOW + AUTHORITY_LIFE


def test_a_pair_is_never_printed():
    assert "PRIVATE" not in repr(make_authority(NOW))
