"""Certificates of our own: an authority, and what it signs for the Services that serve TLS.

Pure, the clock passed in: `adapter.controller.certificate_keeper` keeps them in the cluster. Keys are ECDSA P-256;
everything is PEM. A pair is due for renewal when two thirds of its life are over; what the old authority signed stays
trusted until that authority's own end, because the bundle has both.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFE = dt.timedelta(days=365)
SERVING_LIFE = dt.timedelta(days=90)
_BEFORE = dt.timedelta(minutes=5)
"""Certificates are valid from a little ago: clocks of nodes differ."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Pair(…)"


def make_authority(now: dt.datetime) -> Pair:
    """A new authority, which no other signs."""
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"gpufn CA {serial:x}"[:64])])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), serial, now, now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def issue(authority: Pair, names: Sequence[str], now: dt.datetime) -> Pair:
    """A serving certificate for DNS `names`; it ends no later than its authority."""
    parent = x509.load_pem_x509_certificate(authority.certificate)
    signer = _private(authority.key)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    ends = min(now + SERVING_LIFE, parent.not_valid_after_utc)
    certificate = (
        _builder(subject, parent.subject, key.public_key(), x509.random_serial_number(), now, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _pair(certificate, key)


def why_not(pair: Pair, now: dt.datetime) -> str:
    """Why a pair cannot be used at all; empty where it can. ``unreadable``, ``mismatched`` or ``expired``."""
    try:
        certificate, key = x509.load_pem_x509_certificate(pair.certificate), _private(pair.key)
    except (ValueError, TypeError):
        return "unreadable"
    if certificate.public_key() != key.public_key():
        return "mismatched"
    return "" if certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc else "expired"


def renew_at(certificate: bytes) -> dt.datetime:
    """When two thirds of its life are over."""
    loaded = x509.load_pem_x509_certificate(certificate)
    return loaded.not_valid_before_utc + (loaded.not_valid_after_utc - loaded.not_valid_before_utc) * 2 / 3


def begins_at(certificate: bytes) -> dt.datetime:
    return x509.load_pem_x509_certificate(certificate).not_valid_before_utc + _BEFORE


def names_of(certificate: bytes) -> frozenset[str]:
    """The DNS names that a certificate is for."""
    loaded = x509.load_pem_x509_certificate(certificate)
    try:
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(names.value.get_values_for_type(x509.DNSName))


def signed_by(certificate: bytes, bundle: bytes) -> bool:
    """Whether one of the authorities in `bundle` signed it."""
    loaded = x509.load_pem_x509_certificate(certificate)
    for authority in _certificates(bundle):
        try:
            loaded.verify_directly_issued_by(authority)
            return True
        except (ValueError, TypeError, InvalidSignature):
            continue
    return False


def bundle_of(parts: Iterable[bytes], now: dt.datetime) -> bytes:
    """All authorities in `parts` that have not ended, each once, in their order."""
    alive = {
        certificate.fingerprint(hashes.SHA256()): certificate
        for part in parts
        for certificate in _certificates(part)
        if now < certificate.not_valid_after_utc
    }
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in alive.values())


def _certificates(bundle: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(bundle)
    except ValueError:  # also: there are none
        return []


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("no key of ours")
    return key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    now: dt.datetime,
    ends: dt.datetime,
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(issuer, subject, key, serial, now - _BEFORE, ends)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
