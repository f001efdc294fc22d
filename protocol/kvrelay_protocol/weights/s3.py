"""S3 through boto3: ranges that survive broken connections, and errors in one line each."""

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.weights.stream import RangeFetcher, Received

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

SCHEME = "s3://"
TRIES = 6
"""Broken connections that one range may see."""
_CHUNK_BYTES = 1024 * 1024
_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 5.0
_TRANSIENT = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable"})


@dataclass(frozen=True, slots=True)
class S3Location:
    """A bucket and a prefix without slashes at its ends."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Of `s3://bucket/prefix`.

        Raises:
            InvalidModel: there is no bucket, or something behind a `?` or `#`.
        """
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise InvalidModel(f"{url} is not an S3 location; give s3://bucket/prefix")
        return cls(parts.netloc, parts.path.strip("/"))

    @property
    def name(self) -> str:
        """Last part of the prefix, or the bucket."""
        return self.prefix.rpartition("/")[2] or self.bucket

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True, slots=True)
class PinnedObject:
    """One object as it was first seen; every later request is for just this content."""

    size: int
    etag: str
    version: str | None = None
    """Where the bucket keeps versions."""

    def condition(self) -> dict[str, str]:
        """Arguments of a GET that answers with this content or an error."""
        pinned = {"IfMatch": self.etag}
        return pinned if self.version is None else pinned | {"VersionId": self.version}


def connect(connections: int) -> "S3Client":
    """A client; region, credentials and endpoint are found as boto3 does (AWS_ENDPOINT_URL and so on).

    Args:
        connections: requests it can have under way at once.

    Raises:
        InvalidModel: boto3 is not installed, or what it finds can't be used.
    """
    try:
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError:
        raise InvalidModel("models in S3 need boto3: pip install 'kvrelay[aws]'") from None
    config = Config(
        max_pool_connections=connections,
        connect_timeout=5,
        read_timeout=20,
        retries={"mode": "standard", "total_max_attempts": 4},
        tcp_keepalive=True,
    )
    try:
        return Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise InvalidModel(f"cannot use S3: {_first_line(error)}") from None


def explain(error: Exception, location: S3Location, what: str) -> InvalidModel:
    """A botocore error as one line that names bucket, key and fix.

    Args:
        error: what botocore raised.
        location: where.
        what: the key, with its range where it matters.
    """
    where = f"{SCHEME}{location.bucket}/{what}"
    code = _code(error)
    fixes = {
        "NoSuchBucket": f"bucket {location.bucket} does not exist",
        "NoSuchKey": f"{where} does not exist",
        "404": f"{where} does not exist",
        "AccessDenied": f"access to {where} is denied; s3:GetObject and s3:ListBucket are needed",
        "403": f"access to {where} is denied; s3:GetObject and s3:ListBucket are needed",
        "InvalidAccessKeyId": f"{where}: the AWS access key is not known there",
        "SignatureDoesNotMatch": f"{where}: the AWS secret key is wrong",
        "ExpiredToken": f"{where}: the AWS session token has expired",
        "PreconditionFailed": f"{where} has changed since this start began; start again",
        "412": f"{where} has changed since this start began; start again",
        "NoSuchVersion": f"the version of {where} that this start is pinned to is gone; start again",
    }
    if code in fixes:
        return InvalidModel(fixes[code])
    if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}:
        return InvalidModel(f"no AWS credentials for {where}: set AWS_ACCESS_KEY_ID or a role")
    return InvalidModel(f"cannot read {where}: {_first_line(error)}")


class S3Ranges(RangeFetcher):
    """Ranges of pinned objects."""

    def __init__(
        self,
        client: "S3Client",
        location: S3Location,
        objects: Mapping[str, PinnedObject],
        *,
        on_version: Callable[[str | None], None] | None = None,
    ) -> None:
        """Args:
        client: shared by all threads.
        location: where the objects are.
        objects: by name.
        on_version: told which version answered.
        """
        self._client = client
        self._location = location
        self._objects = objects
        self._on_version = on_version
        self._lock = threading.Lock()

    def fetch(self, file: str, start: int, into: memoryview, received: Received) -> None:
        """Fill `into`; a broken connection goes on from its last byte, `TRIES` times in all."""
        done = failures = 0
        while done < len(into):
            try:
                done += self._read(file, start + done, into[done:], received)
            except _Broken as broken:
                done += broken.received
                failures += 1
                if failures == TRIES:
                    span = f"{self._location.key(file)} bytes {start} to {start + len(into)}"
                    raise InvalidModel(
                        f"cannot read {SCHEME}{self._location.bucket}/{span}: given up after "
                        f"{TRIES} tries, {done} bytes had come: {_first_line(broken.cause)}"
                    ) from None
                with self._lock:
                    self.resumed += 1
                _back_off(failures)

    def _read(self, file: str, start: int, into: memoryview, received: Received) -> int:
        from botocore.exceptions import BotoCoreError, ClientError

        done = 0
        try:
            body = _Body(self._open(file, start, start + len(into)))
            try:
                while done < len(into):
                    count = body.readinto(into[done : done + _CHUNK_BYTES])
                    if not count:
                        raise ConnectionError("the answer ended early")
                    done += count
                    received(count)
                body.release()
            finally:
                body.close()
        except (BotoCoreError, ClientError, HTTPException, OSError) as error:
            if not _may_pass(error):
                raise explain(error, self._location, self._location.key(file)) from None
            raise _Broken(done, error) from None
        return done

    def _open(self, file: str, start: int, end: int) -> Any:
        pinned, key = self._objects[file], self._location.key(file)
        answer = self._client.get_object(
            Bucket=self._location.bucket,
            Key=key,
            Range=f"bytes={start}-{end - 1}",
            **pinned.condition(),  # type: ignore[arg-type] # both are plain strings
        )
        where = f"{SCHEME}{self._location.bucket}/{key}"
        # Not every S3-compatible store honours If-Match, or a range.
        if answer["ETag"] != pinned.etag:
            answer["Body"].close()
            raise InvalidModel(f"{where} has changed since this start began; start again")
        expected = f"bytes {start}-{end - 1}/{pinned.size}"
        if answer.get("ContentRange") != expected:
            answer["Body"].close()
            found = answer.get("ContentRange", "the whole object")
            raise InvalidModel(f"{where}: asked for {expected}, the store answers with {found}")
        if self._on_version is not None:
            self._on_version(answer.get("VersionId"))
        return answer["Body"]


class _Body:
    """An answer, read from its socket straight into a buffer.

    `readinto` of botocore and urllib3 reads into new bytes and copies them, which costs half the rate of
    a fast link; so the http.client response below them is read, where it is found. The connection then
    has to be given back by hand.
    """

    def __init__(self, body: Any) -> None:
        self._body = body
        self._outer = getattr(body, "_raw_stream", None)
        inner = getattr(self._outer, "_fp", None)
        self._inner = inner if isinstance(inner, HTTPResponse) else None

    def readinto(self, buffer: memoryview) -> int:
        return int((self._body if self._inner is None else self._inner).readinto(buffer))

    def release(self) -> None:
        """All has been read: another request may have the connection."""
        if self._inner is not None and self._outer is not None:
            self._outer.release_conn()

    def close(self) -> None:
        """Closes the connection, unless it was released."""
        self._body.close()


class _Broken(Exception):
    """A connection ended early."""

    def __init__(self, received: int, cause: Exception) -> None:
        super().__init__()
        self.received = received
        self.cause = cause


def _may_pass(error: Exception) -> bool:
    """Another try may work: the network's errors and those the store calls its own."""
    from botocore.exceptions import (
        HTTPClientError,
        IncompleteReadError,
        ReadTimeoutError,
        ResponseStreamingError,
    )

    network = (
        HTTPClientError,
        HTTPException,
        IncompleteReadError,
        OSError,
        ReadTimeoutError,
        ResponseStreamingError,
    )
    return isinstance(error, network) or _code(error) in _TRANSIENT or _status(error) >= 500


def _back_off(failures: int) -> None:
    longest = min(_BACKOFF_S * 2**failures, _LONGEST_BACKOFF_S)
    time.sleep(longest * random.uniform(0.5, 1.0))


def _response(error: Exception) -> dict[str, Any]:
    return getattr(error, "response", None) or {}


def _code(error: Exception) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: Exception) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def endpoint_folder(client: "S3Client") -> str:
    """A folder name for the store that a client talks to."""
    return quote(urlsplit(client.meta.endpoint_url).netloc, safe="")
