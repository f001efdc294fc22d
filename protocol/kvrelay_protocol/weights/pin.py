"""A model in S3, pinned: what its objects were when first seen, its small files in a local folder.

    <cache>/kvrelay/models/s3/<store>/<bucket>/<prefix>/<revision>/
        config.json, tokenizer.json, ...      as they are in the bucket
        pinned.json                           size, ETag and version of every object
        heads/<file>                          header of every weight file

The revision is a digest of all names, sizes and ETags. A folder is written whole or not at all.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.weights.header import (
    LENGTH_BYTES,
    Header,
    header_bytes,
    parse_header,
    select_tensors,
)
from kvrelay_protocol.weights.local import read_index
from kvrelay_protocol.weights.manifest import MANIFEST, Manifest, parse_manifest
from kvrelay_protocol.weights.peer import FindPeer, PeerFirst
from kvrelay_protocol.weights.s3 import (
    PinnedObject,
    S3Location,
    S3Ranges,
    connect,
    endpoint_folder,
    explain,
)
from kvrelay_protocol.weights.stream import (
    RangeFetcher,
    RemoteFiles,
    StreamedWeights,
    StreamOptions,
)

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_PINNED = "pinned.json"
_HEADS = "heads"
_FIRST_READ = 256 * 1024
"""Most headers are smaller: one request."""
_SMALL_FILE_BYTES = 256 * 1024 * 1024
_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """One revision of a model in S3."""

    location: S3Location
    revision: str
    directory: Path
    """Its small files on this machine."""
    objects: Mapping[str, PinnedObject]
    client: "S3Client"

    def headers(self) -> dict[str, Header]:
        """Of every weight file.

        Raises:
            InvalidModel: one of them is damaged.
        """
        return {
            name: parse_header(
                (self.directory / _HEADS / name).read_bytes(),
                file=name,
                size=item.size,
                where=f"{self.location}/{name}",
            )
            for name, item in self._weights().items()
        }

    def stream(self, options: StreamOptions, find_peer: FindPeer | None = None) -> StreamedWeights:
        """Begin to fetch the weights.

        Args:
            options: how.
            find_peer: asks for another worker that has them; None: they come from the store.

        Raises:
            InvalidModel: headers and index do not fit together.
        """
        files = RemoteFiles(
            origin=str(self.location),
            sizes={name: item.size for name, item in self._weights().items()},
            heads={name: (self.directory / _HEADS / name).read_bytes() for name in self._weights()},
            tensors=select_tensors(self.headers(), read_index(self.directory), str(self.location)),
            manifest=_read_manifest(self.directory, self.location),
        )
        fetcher: RangeFetcher = S3Ranges(self.client, self.location, self.objects)
        if find_peer is not None:
            fetcher = PeerFirst(fetcher, find_peer, files.manifest)
        return StreamedWeights(files, fetcher, options)

    def _weights(self) -> dict[str, PinnedObject]:
        return {n: item for n, item in self.objects.items() if n.endswith(".safetensors")}


def pin_model(
    url: str, revision: str | None, patterns: Sequence[str], *, cache: Path | None = None
) -> PinnedModel:
    """Find out what is there, and bring everything but the weights' data here.

    Args:
        url: `s3://bucket/prefix`.
        revision: None for what is there now; else it must be this one (from an earlier start).
        patterns: names of the files that make a model.
        cache: where model folders are kept; by default XDG_CACHE_HOME or ~/.cache.

    Raises:
        InvalidModel: nothing there, no access, another revision, or a wrong checksum.
    """
    location = S3Location.parse(url)
    client = connect(_CONNECTIONS)
    base = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "kvrelay" / "models" / "s3" / endpoint_folder(client) / location.bucket
    folder /= quote(location.prefix, safe="") or "_"
    if revision is None or not (folder / revision / _PINNED).is_file():
        listed = _list(client, location, [*patterns, MANIFEST])
        found = _revision(listed)
        if revision not in {None, found}:
            raise InvalidModel(
                f"{location} is at revision {found}, --revision asks for {revision}: its objects "
                "have changed; leave the flag out to take what is there"
            )
        revision = found
        if not (folder / revision / _PINNED).is_file():
            _fill(folder / revision, client, location, listed)
    directory = folder / revision
    pinned = json.loads((directory / _PINNED).read_text())
    objects = {name: PinnedObject(**item) for name, item in pinned.items()}
    return PinnedModel(location, revision, directory, objects, client)


def _list(
    client: "S3Client", location: S3Location, patterns: Sequence[str]
) -> dict[str, PinnedObject]:
    from botocore.exceptions import BotoCoreError, ClientError

    prefix = location.key("")
    found: dict[str, PinnedObject] = {}
    try:
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=location.bucket, Prefix=prefix, Delimiter="/"
        )
        for page in pages:
            for item in page.get("Contents", ()):
                name = item["Key"].removeprefix(prefix)
                if any(fnmatch(name, pattern) for pattern in patterns):
                    found[name] = PinnedObject(item["Size"], item["ETag"])
    except (BotoCoreError, ClientError) as error:
        raise explain(error, location, prefix) from None
    if not found:
        raise InvalidModel(
            f"{location} holds no model: no object there has the name of one's files"
        )
    return found


def _revision(objects: Mapping[str, PinnedObject]) -> str:
    lines = (f"{name} {item.size} {item.etag}\n" for name, item in sorted(objects.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _fill(
    directory: Path, client: "S3Client", location: S3Location, listed: Mapping[str, PinnedObject]
) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        (partial / _HEADS).mkdir()
        objects = dict(listed)

        def bring(name: str) -> None:
            weights = name.endswith(".safetensors")
            take = _take_head if weights else _take_file
            content, objects[name] = take(client, location, name, listed[name])
            (partial / _HEADS / name if weights else partial / name).write_bytes(content)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(bring, listed))
        manifest = _read_manifest(partial, location)
        for name in listed if manifest is not None else ():
            if name != MANIFEST:
                _verify(manifest, partial, name, location)
        pinned = {name: asdict(item) for name, item in objects.items()}
        (partial / _PINNED).write_text(json.dumps(pinned, indent=1))
        _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, directory: Path) -> None:
    try:
        partial.rename(directory)
    except OSError:
        # Another process has been as quick; the same revision is the same content.
        if not (directory / _PINNED).is_file():
            raise


def _verify(manifest: Manifest | None, folder: Path, name: str, location: S3Location) -> None:
    path = folder / _HEADS / name if name.endswith(".safetensors") else folder / name
    if manifest is not None:
        manifest.check_file(name, path.read_bytes(), f"{location}/{name}")


def _take_file(
    client: "S3Client", location: S3Location, name: str, item: PinnedObject
) -> tuple[bytes, PinnedObject]:
    if item.size > _SMALL_FILE_BYTES:
        raise InvalidModel(
            f"{location}/{name} has {item.size} bytes; files beside the weights may have "
            f"{_SMALL_FILE_BYTES}"
        )
    return _first_bytes(client, location, name, item, item.size)


def _take_head(
    client: "S3Client", location: S3Location, name: str, item: PinnedObject
) -> tuple[bytes, PinnedObject]:
    content, item = _first_bytes(client, location, name, item, min(item.size, _FIRST_READ))
    length = header_bytes(content[:LENGTH_BYTES], f"{location}/{name}")
    if length > len(content):
        content, item = _first_bytes(client, location, name, item, min(item.size, length))
    return content[:length], item


def _first_bytes(
    client: "S3Client", location: S3Location, name: str, item: PinnedObject, size: int
) -> tuple[bytes, PinnedObject]:
    """An object's beginning, and the object with its version."""
    if not size:
        return b"", item
    versions: list[str | None] = []
    ranges = S3Ranges(client, location, {name: item}, on_version=versions.append)
    content = bytearray(size)
    ranges.fetch(name, 0, memoryview(content), lambda _: None)
    return bytes(content), PinnedObject(item.size, item.etag, versions[-1])


def _read_manifest(directory: Path, location: S3Location) -> Manifest | None:
    path = directory / MANIFEST
    if not path.is_file():
        return None
    return parse_manifest(path.read_text(encoding="utf-8"), f"{location}/{MANIFEST}")


Progress = Callable[[str, int], None]
"""Told a file's name and its bytes as its upload begins."""


def push_model(
    directory: Path, url: str, patterns: Sequence[str], progress: Progress | None = None
) -> str:
    """Upload a model folder and, last, the manifest of its checksums.

    Args:
        directory: a Hugging Face folder.
        url: `s3://bucket/prefix`; one prefix a revision, so that no start sees two at once.
        patterns: names of the files that make a model.
        progress: told about each file.

    Returns:
        The revision, as `pin_model` will call it.

    Raises:
        InvalidModel: no weights, a damaged file, or the upload failed.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    from kvrelay_protocol.weights.manifest import make_manifest

    location = S3Location.parse(url)
    names = [
        path.name
        for path in sorted(directory.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)
    ]
    if not any(name.endswith(".safetensors") for name in names):
        raise InvalidModel(f"{directory} has no *.safetensors weights")
    manifest = make_manifest(directory, names)
    client = connect(_CONNECTIONS)
    try:
        for name in names:
            if progress is not None:
                progress(name, (directory / name).stat().st_size)
            client.upload_file(str(directory / name), location.bucket, location.key(name))
        body = manifest.to_json().encode()
        client.put_object(Bucket=location.bucket, Key=location.key(MANIFEST), Body=body)
    except (BotoCoreError, ClientError) as error:
        raise explain(error, location, location.prefix) from None
    except Boto3Error as error:
        raise InvalidModel(f"cannot write {location}: {error}") from None
    return _revision(_list(client, location, [*patterns, MANIFEST]))
