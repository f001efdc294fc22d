"""The header of a safetensors file: which tensor lies where.

    8 bytes little-endian length n | n bytes of JSON {name: {dtype, shape, data_offsets}} | data

Source: https://huggingface.co/docs/safetensors (format). Offsets there count from the end of the
header; `StoredTensor` counts from the start of the file.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay_protocol.errors import InvalidModel

MAX_HEADER_BYTES = 100 * 1024 * 1024
LENGTH_BYTES = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element, of the dtypes a model can be loaded from."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in one file; positions are bytes from the file's start."""

    file: str
    dtype: str
    """As safetensors names it, such as BF16."""
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


Header = Mapping[str, StoredTensor]


def header_bytes(prefix: bytes, where: str) -> int:
    """Bytes before the data, from the first 8 bytes of a file.

    Raises:
        InvalidModel: it is no safetensors file.
    """
    if len(prefix) < LENGTH_BYTES:
        raise InvalidModel(f"{where} is not a safetensors file")
    (length,) = struct.unpack_from("<Q", prefix)
    if not 0 < length <= MAX_HEADER_BYTES:
        raise InvalidModel(f"{where} is not a safetensors file")
    return LENGTH_BYTES + int(length)


def parse_header(raw: bytes, *, file: str, size: int, where: str) -> dict[str, StoredTensor]:
    """The tensors of a file.

    Args:
        raw: its first `header_bytes` bytes.
        file: its name.
        size: bytes of the whole file.
        where: how an error names it.

    Raises:
        InvalidModel: it is damaged or cut short.
    """
    try:
        entries: dict[str, Any] = json.loads(raw[LENGTH_BYTES:])
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(entry, file, len(raw)) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidModel(f"{where} is not a safetensors file") from None
    end = max((tensor.end for tensor in tensors.values()), default=len(raw))
    if size != end:
        raise InvalidModel(f"{where} is damaged: {size} bytes, its header says {end}")
    for name, tensor in tensors.items():
        item = ITEM_BYTES.get(tensor.dtype)
        if item is not None and tensor.nbytes != item * tensor.elements:
            raise InvalidModel(
                f"{where} is damaged: {name} takes {tensor.nbytes} bytes, "
                f"{tensor.dtype} {list(tensor.shape)} is {item * tensor.elements}"
            )
    return tensors


def _tensor(entry: Mapping[str, Any], file: str, data: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError
    return StoredTensor(file, str(entry["dtype"]), shape, data + int(begin), data + int(end))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file on this machine.

    Raises:
        InvalidModel: it is damaged, cut short or can't be read.
    """
    try:
        with path.open("rb") as opened:
            prefix = opened.read(LENGTH_BYTES)
            raw = prefix + opened.read(header_bytes(prefix, str(path)) - LENGTH_BYTES)
            size = path.stat().st_size
    except OSError as error:
        raise InvalidModel(f"cannot read {path}: {error.strerror or error}") from None
    return parse_header(raw, file=path.name, size=size, where=str(path))


def select_tensors(
    headers: Mapping[str, Header], index: Mapping[str, str] | None, where: str
) -> dict[str, StoredTensor]:
    """The checkpoint's tensors among those of its files.

    Args:
        headers: by file name.
        index: file of each tensor (`weight_map`), where the checkpoint has several files.
        where: how an error names the checkpoint.

    Raises:
        InvalidModel: the index names a file or tensor that is not there.
    """
    if index is None:
        return {name: tensor for header in headers.values() for name, tensor in header.items()}
    for name, file in index.items():
        if file not in headers:
            raise InvalidModel(f"{where} lacks the weight file {file}")
        if name not in headers[file]:
            raise InvalidModel(f"{file} in {where} lacks {name}")
    return {name: headers[file][name] for name, file in index.items()}
