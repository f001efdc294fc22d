"""Certificates for tests, made by the `openssl` of the system: an authority, and what it signs."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    cert: Path
    key: Path


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


class Authority:
    """Signs certificates of hosts. Its own is `cert`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._name = folder, name
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}-key.pem"
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", self._key, "-out", self.cert, "-days", 2, "-subj", f"/CN={name}"),
        )

    def issue(self, host: str) -> Identity:
        """A certificate for this host name or address, good for either end of a connection."""
        stem = self._folder / f"{self._name}-{host}"
        cert, key, request, extra = (
            stem.with_name(f"{stem.name}{end}") for end in (".pem", "-key.pem", ".csr", ".ext")
        )
        kind = "IP" if host.replace(".", "").isdigit() else "DNS"
        extra.write_text(f"subjectAltName={kind}:{host}\n")
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", key, "-out", request, "-subj", f"/CN={host}"),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key),
            *("-CAcreateserial", "-days", 2, "-out", cert, "-extfile", extra),
        )
        return Identity(cert, key)
