"""A client's settings, resolved once: argument, then environment, then default.

The only file of the SDK that reads the environment.
"""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvrelay._types import Retries, Timeout

DEFAULT_BASE_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Config:
    """Where the server is and how patient to be."""

    base_url: str
    """Scheme, host and path prefix; neither a trailing slash nor `/v1`."""
    api_key: str | None = field(repr=False)
    timeout: Timeout
    retries: Retries


def resolve(
    *,
    base_url: str | None,
    api_key: str | None,
    timeout: Timeout,
    retries: Retries,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Settings from arguments, `KVRELAY_BASE_URL`, `KVRELAY_API_KEY` and defaults, in that order."""
    url = base_url or environ.get("KVRELAY_BASE_URL") or DEFAULT_BASE_URL
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"base_url must start with http:// or https:// and name a host: {url!r}")
    # OpenAI's clients want the /v1 in the URL; people copy it from there.
    root = url.rstrip("/").removesuffix("/v1").rstrip("/")
    key = api_key if api_key is not None else environ.get("KVRELAY_API_KEY")
    return Config(root, key or None, timeout, retries)


def tls(config: Config) -> ssl.SSLContext | bool:
    """The `verify` argument of the HTTP client.

    Loading the certificates takes longer than a short answer, so a plain-text base URL gets a
    context that knows none: it trusts nobody, should a redirect or proxy ever lead to TLS.
    """
    if config.base_url.lower().startswith("https"):
        return True
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
