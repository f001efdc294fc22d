"""Certificates of a Join stream's two ends, read and checked before anything starts.

gRPC reports a certificate that it can't use on its own log at the first connection; here it is one
line that names the flag.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay_protocol.errors import UsageError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """One end's identity and whom it trusts. PEM."""

    certificate: bytes | None
    """The chain, own certificate first."""
    key: bytes | None
    authority: bytes | None
    """Certificates that the other end's must descend from."""


def read_tls(
    cert: Path | None, key: Path | None, authority: Path | None, *, flags: tuple[str, str, str]
) -> TlsFiles | None:
    """Read what was given; None where nothing was.

    Args:
        cert: certificate chain.
        key: its private key, without a passphrase.
        authority: certificates of authorities.
        flags: the three settings' names, for errors.

    Raises:
        UsageError: a file can't be read or is no PEM, or certificate and key don't belong together.
    """
    if cert is None and key is None and authority is None:
        return None
    if (cert is None) != (key is None):
        given, missing = (flags[0], flags[1]) if key is None else (flags[1], flags[0])
        raise UsageError(f"{given} needs {missing}: a certificate and its key come together")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if cert is not None and key is not None:
        _check(f"{flags[0]} {cert} with {flags[1]} {key}", _load_chain, context, cert, key)
    if authority is not None:
        _check(f"{flags[2]} {authority}", context.load_verify_locations, authority)
    return TlsFiles(
        *(None if path is None else path.read_bytes() for path in (cert, key, authority))
    )


def _load_chain(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    # A passphrase that nobody is there to type.
    context.load_cert_chain(cert, key, password=lambda: "")


def _check(what: str, load: Callable[..., Any], *arguments: Any) -> None:
    try:
        load(*arguments)
    except (OSError, ValueError) as error:  # `SSLError` is an `OSError`
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UsageError(f"can't use {what}: {reason}") from None
