"""Weights in files of this machine, mapped: the page cache is the buffer."""

import contextlib
import ctypes
import json
import mmap
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.weights.header import Header, StoredTensor, read_header, select_tensors
from kvrelay_protocol.weights.source import LoadReport

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class LocalWeights:
    """A folder's safetensors files as a `WeightSource`."""

    def __init__(self, directory: Path, *, link_bytes_per_s: float | None = None) -> None:
        """Read all headers and map the files; no data is read.

        Args:
            directory: a folder with safetensors.
            link_bytes_per_s: what its disk can do, where the operator says so.

        Raises:
            InvalidModel: no weights, or a file that is missing, damaged or cut short.
        """
        self._directory = directory
        self._link = link_bytes_per_s
        index = read_index(directory)
        names = {SINGLE} if index is None else set(index.values())
        if index is None and not (directory / SINGLE).is_file():
            raise InvalidModel(f"{directory} has neither {SINGLE} nor {INDEX}")
        headers: dict[str, Header] = {}
        self._maps: dict[str, mmap.mmap] = {}
        for file in sorted(names):
            path = directory / file
            if not path.is_file():
                raise InvalidModel(f"{directory} lacks the weight file {file}")
            try:
                headers[file] = read_header(path)
                self._maps[file] = _map(path)
            except (InvalidModel, OSError) as error:
                raise InvalidModel(f"cannot read the weights in {directory}: {error}") from None
        self._tensors = select_tensors(headers, index, str(directory))
        self._sizes = {file: len(mapped) for file, mapped in self._maps.items()}
        self._cached = _resident_bytes(self._maps.values())
        self._begun = self._ended = time.monotonic()
        self._read = 0

    @property
    def origin(self) -> str:
        return str(self._directory)

    @property
    def files(self) -> Mapping[str, int]:
        return self._sizes

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    @property
    def identity(self) -> str:
        return ""

    @property
    def kept(self) -> None:
        """The files are there already."""
        return

    def need(self, names: Collection[str]) -> None:
        """Nothing to leave out: what nobody touches is never read."""
        del names
        self._begun = time.monotonic()

    def read(self, name: str) -> memoryview:
        tensor = self._tensors[name]
        self._read += tensor.nbytes
        self._ended = time.monotonic()
        return memoryview(self._maps[tensor.file])[tensor.start : tensor.end]

    def read_range(self, file: str, start: int, size: int) -> bytes:
        return self._maps[file][start : start + size]

    def report(self) -> LoadReport:
        return LoadReport(
            origin=self.origin,
            nbytes=self._read,
            seconds=self._ended - self._begun,
            link_bytes_per_s=self._link,
            link_given=self._link is not None,
            cached_bytes=None if self._cached is None else min(self._cached, self._read),
        )

    def close(self) -> None:
        """Let go of the maps; each lives on as long as a tensor lies in it."""
        self._maps.clear()


def read_index(directory: Path) -> dict[str, str] | None:
    """File of each tensor; None where the folder has no index.

    Raises:
        InvalidModel: it can't be used, or names a file outside the folder.
    """
    path = directory / INDEX
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"cannot read {path}: {error}") from None
    files = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in files.values()
    ):
        raise InvalidModel(f"{path} has no usable weight_map")
    return files


def _map(path: Path) -> mmap.mmap:
    """Private and writable, as tensors over it must be; nobody writes, so no page is copied."""
    with path.open("rb") as file:
        return mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )


def _resident_bytes(maps: Collection[mmap.mmap]) -> int | None:
    """How much of the files is in the page cache now (mincore(2)); None where it can't be asked."""
    with contextlib.suppress(OSError, AttributeError):
        return sum(_resident_pages(mapped) for mapped in maps) * mmap.PAGESIZE
    return None


def _resident_pages(mapped: mmap.mmap) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    pages = -(-len(mapped) // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * pages)()
    start = (ctypes.c_char * len(mapped)).from_buffer(mapped)
    failed = libc.mincore(
        ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), states
    )
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return bytes(states).translate(_LOWEST_BIT).count(1)


_LOWEST_BIT = bytes(value & 1 for value in range(256))
"""Of each page's state, the only bit that has a meaning."""
