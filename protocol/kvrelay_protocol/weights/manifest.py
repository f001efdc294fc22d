"""`kvrelay.manifest.json`: sha256 of everything in a model, in pieces that a stream can check.

An ETag is not a digest of a range, and S3's stored checksums cover whole objects; these digests are
taken where the model was uploaded from and checked where it is used.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.weights.header import LENGTH_BYTES, header_bytes, read_header
from kvrelay_protocol.weights.plan import PIECE_BYTES, Piece

MANIFEST = "kvrelay.manifest.json"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """Digests as lower-case hex."""

    piece_bytes: int
    files: Mapping[str, str]
    """Of each whole small file; of a weight file's header."""
    tensors: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """By weight file and tensor: of each piece."""

    def check_file(self, name: str, content: bytes, where: str) -> None:
        """Of a small file, or the header of a weight file.

        Raises:
            InvalidModel: it is not in the manifest, or not what it was.
        """
        _check(self.files.get(name), content, where)

    def check_piece(self, file: str, piece: Piece, content: memoryview, where: str) -> None:
        """Of part of a tensor.

        Raises:
            InvalidModel: it is not in the manifest, or not what it was.
        """
        digests = self.tensors.get(file, {}).get(piece.tensor, ())
        expected = digests[piece.index] if piece.index < len(digests) else None
        _check(expected, content, f"{piece.tensor} in {where} (bytes {piece.start} to {piece.end})")

    def identity(self) -> str:
        """32 hex digits that name exactly these bytes: the same ones wherever they were pushed to."""
        names = {"files": self.files, "tensors": self.tensors, "piece_bytes": self.piece_bytes}
        content = json.dumps(names, sort_keys=True, separators=(",", ":")).encode()
        return hashlib.blake2b(content, digest_size=16, person=b"kvrelay weights").hexdigest()

    def to_json(self) -> str:
        return json.dumps(
            {
                "version": _VERSION,
                "piece_bytes": self.piece_bytes,
                "files": self.files,
                "tensors": self.tensors,
            },
            indent=1,
        )


def _check(expected: str | None, content: bytes | memoryview, where: str) -> None:
    if expected is None:
        raise InvalidModel(f"{where} is not in {MANIFEST}: push the whole model again")
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise InvalidModel(
            f"wrong checksum: {where} has sha256 {found[:16]}…, {MANIFEST} says {expected[:16]}…; "
            "push the model again"
        )


def parse_manifest(text: str, where: str) -> Manifest:
    """Read one.

    Raises:
        InvalidModel: it is damaged or of another version.
    """
    try:
        raw: dict[str, Any] = json.loads(text)
        if raw["version"] != _VERSION:
            raise InvalidModel(
                f"{where} has version {raw['version']}; this kvrelay reads version {_VERSION}"
            )
        manifest = Manifest(
            int(raw["piece_bytes"]),
            {str(name): str(digest) for name, digest in raw["files"].items()},
            {
                str(file): {str(name): tuple(map(str, pieces)) for name, pieces in held.items()}
                for file, held in raw["tensors"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidModel(f"{where} is not a manifest; push the model again") from None
    if manifest.piece_bytes <= 0:
        raise InvalidModel(f"{where} is not a manifest; push the model again")
    return manifest


def make_manifest(directory: Path, names: list[str], piece_bytes: int = PIECE_BYTES) -> Manifest:
    """Digest the named files of a folder.

    Raises:
        InvalidModel: a weight file is damaged.
    """
    files: dict[str, str] = {}
    tensors: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in names:
        path = directory / name
        if path.suffix != ".safetensors":
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            continue
        files[name], tensors[name] = _digest_weights(path, piece_bytes)
    return Manifest(piece_bytes, files, tensors)


def _digest_weights(path: Path, piece_bytes: int) -> tuple[str, dict[str, tuple[str, ...]]]:
    header = read_header(path)
    with path.open("rb") as file:
        head = file.read(LENGTH_BYTES)
        head += file.read(header_bytes(head, str(path)) - LENGTH_BYTES)

        def digests(start: int, end: int) -> tuple[str, ...]:
            file.seek(start)
            sizes = (min(piece_bytes, end - at) for at in range(start, end, piece_bytes))
            return tuple(hashlib.sha256(file.read(size)).hexdigest() for size in sizes)

        pieces = {name: digests(tensor.start, tensor.end) for name, tensor in header.items()}
    return hashlib.sha256(head).hexdigest(), pieces
