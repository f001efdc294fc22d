"""Weights that arrive in layer order while earlier ones are already being used.

    fetch threads:  part -> its place in a segment's buffer -> checksum -> "here"
    the engine:     read(name) waits for the tensor's parts; a segment all of whose tensors were read
                    is let go, and the next one may start

Memory: buffers of at most `window_bytes` are being filled or wait to be read. A segment that the engine
waits for starts in any case, so that no order of reads can stand still.
"""

import contextlib
import mmap
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.weights.header import StoredTensor
from kvrelay_protocol.weights.kept import KeptFiles
from kvrelay_protocol.weights.manifest import Manifest
from kvrelay_protocol.weights.plan import Part, Segment, plan_segments
from kvrelay_protocol.weights.rate import RateMeter
from kvrelay_protocol.weights.source import SAMPLE_BYTES, LoadReport, PeerShare, sample_offsets

MiB = 1024 * 1024
_UNVERIFIED_PIECE_BYTES = MiB
"""Where no checksum says otherwise: small, so that requests come out as large as they may be."""

Received = Callable[[int], None]
"""Told how many bytes have just arrived; raises to end the fetch."""


class FetchCancelled(Exception):
    """The source was closed while a range was under way."""


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How a stream fetches."""

    streams: int = 32
    """Requests at once."""
    part_bytes: int = 16 * MiB
    window_bytes: int = 1024 * MiB
    link_bytes_per_s: float | None = None
    """Of the narrowest link, where the operator says so."""
    keep_in: Path | None = None
    """Also write what arrives to nameless files in this folder, for workers that start later."""


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """What is known of a checkpoint before its data is fetched."""

    origin: str
    sizes: Mapping[str, int]
    """Bytes of each weight file."""
    heads: Mapping[str, bytes]
    """Of each, everything before its data."""
    tensors: Mapping[str, StoredTensor]
    manifest: Manifest | None


class RangeFetcher(ABC):
    """Fetches bytes of a file; called by many threads at once."""

    resumed: int = 0
    """Ranges taken up again after a broken connection."""

    @abstractmethod
    def fetch(self, file: str, start: int, into: memoryview, received: Received) -> None:
        """Fill `into` with the bytes from `start` on.

        Raises:
            InvalidModel: they can't be had.
        """

    def distrust(self, file: str, start: int) -> bool:
        """The range from `start` had a wrong checksum: would another try fetch it elsewhere?"""
        del file, start
        return False

    def peer_share(self) -> PeerShare | None:
        """What came from another worker; None: nobody was to be asked."""
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to free
        """Nothing more is fetched. Idempotent."""


class StreamedWeights:
    """A `WeightSource` whose fetching begins when it is made."""

    def __init__(
        self, files: RemoteFiles, fetcher: RangeFetcher, options: StreamOptions | None = None
    ) -> None:
        self._remote = files
        self._fetcher = fetcher
        self._options = options or StreamOptions()
        self._segments = plan_segments(
            files.tensors,
            part_bytes=self._options.part_bytes,
            # With a manifest a part holds whole pieces of it: one at least.
            piece_bytes=min(_UNVERIFIED_PIECE_BYTES, self._options.part_bytes)
            if files.manifest is None
            else files.manifest.piece_bytes,
        )
        self._parts: Sequence[Part] = [part for segment in self._segments for part in segment.parts]
        self._segment_of = {
            name: index for index, segment in enumerate(self._segments) for name in segment.tensors
        }
        self._unread = [set(segment.tensors) for segment in self._segments]
        self._missing: dict[str, int] = dict.fromkeys(files.tensors, 0)
        """Pieces of each tensor that are not here yet."""
        for part in self._parts:
            for piece in part.pieces:
                self._missing[piece.tensor] += 1
        self._buffers: dict[int, mmap.mmap] = {}
        self._held = 0
        """Bytes of the segments in `_buffers`."""
        self.peak_bytes = 0
        """The most that `_held` has been."""
        self._next = 0
        self._wanted = -1
        """The segment that a reader waits for."""
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._samples = _Samples(files.sizes)
        for file, head in files.heads.items():
            self._samples.keep(file, 0, memoryview(head))
        keep_in, identity = self._options.keep_in, self.identity
        # What has no name nobody can ask for.
        self._kept = KeptFiles(keep_in, files.sizes, identity) if keep_in and identity else None
        self._meter = RateMeter()
        self._fetched = 0
        self._begun = self._ended = time.monotonic()
        for number in range(min(self._options.streams, len(self._parts))):
            name = f"weights-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    # ---- WeightSource

    @property
    def origin(self) -> str:
        return self._remote.origin

    @property
    def files(self) -> Mapping[str, int]:
        return self._remote.sizes

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._remote.tensors

    @property
    def identity(self) -> str:
        manifest = self._remote.manifest
        return "" if manifest is None else manifest.identity()

    @property
    def kept(self) -> KeptFiles | None:
        return self._kept

    def need(self, names: Collection[str]) -> None:
        with self._changed:
            for index, unread in enumerate(self._unread):
                unread &= set(names)
                self._let_go_if_read(index)
            self._changed.notify_all()

    def read(self, name: str) -> memoryview:
        tensor, index = self._remote.tensors[name], self._segment_of[name]
        if not tensor.nbytes:
            return memoryview(b"")
        with self._changed:
            if name not in self._unread[index]:
                raise KeyError(f"{name} was read before, or is not among what is needed")
            self._wanted = max(self._wanted, index)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._missing[name] or self._error is not None or self._closed
            )
            if self._error is not None:
                raise self._error
            if self._closed:
                raise FetchCancelled
            view = self._view(index, tensor.start, tensor.end)
            self._unread[index].discard(name)
            self._let_go_if_read(index)
            self._changed.notify_all()
        return view

    def read_range(self, file: str, start: int, size: int) -> bytes:
        kept = self._samples.find(file, start)
        if kept is not None and len(kept) >= size:
            return bytes(kept[:size])
        buffer = bytearray(min(size, self._remote.sizes[file] - start))
        self._fetcher.fetch(file, start, memoryview(buffer), self._received)
        return bytes(buffer)

    def report(self) -> LoadReport:
        given = self._options.link_bytes_per_s
        return LoadReport(
            origin=self.origin,
            nbytes=self._fetched,
            seconds=self._ended - self._begun,
            link_bytes_per_s=self._meter.best() if given is None else given,
            link_given=given is not None,
            resumed=self._fetcher.resumed,
            verified=self._remote.manifest is not None,
            peer=self._fetcher.peer_share(),
        )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._buffers.clear()
            self._changed.notify_all()
        self._fetcher.close()

    # ---- fetch threads

    def _work(self) -> None:
        try:
            while (part := self._take()) is not None:
                self._fetch(part)
        except FetchCancelled:
            return
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take(self) -> Part | None:
        """The next part, once there is room for it; None when there is none left."""
        with self._changed:
            while not self._closed and self._error is None:
                self._skip_unneeded()
                if self._next == len(self._parts):
                    return None
                part = self._parts[self._next]
                if self._may_start(part.segment):
                    self._next += 1
                    self._allocate(part.segment)
                    return part
                self._changed.wait()
            return None

    def _skip_unneeded(self) -> None:
        while self._next < len(self._parts):
            index = self._parts[self._next].segment
            if self._unread[index] or index in self._buffers:
                return
            self._next += 1

    def _may_start(self, index: int) -> bool:
        room = self._held + self._segments[index].nbytes <= self._options.window_bytes
        return index in self._buffers or room or not self._held or index <= self._wanted

    def _allocate(self, index: int) -> None:
        if index in self._buffers:
            return
        segment = self._segments[index]
        size = _lead(segment) + segment.nbytes
        buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A fault for every 4 KiB would cost more than the copy; a kernel without huge pages says no.
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        self._buffers[index] = buffer
        self._held += segment.nbytes
        self.peak_bytes = max(self.peak_bytes, self._held)

    def _fetch(self, part: Part) -> None:
        file = self._segments[part.segment].file
        with self._changed:
            if part.segment not in self._buffers:  # nobody needs it any more
                return
            view = self._view(part.segment, part.start, part.end)
        self._fetch_verified(file, part, view)
        self._samples.keep(file, part.start, view)
        if self._kept is not None:
            self._kept.keep(file, part.start, view)
        with self._changed:
            self._fetched += part.end - part.start
            self._ended = time.monotonic()
            for piece in part.pieces:
                self._missing[piece.tensor] -= 1
            self._changed.notify_all()

    def _fetch_verified(self, file: str, part: Part, view: memoryview) -> None:
        while True:
            self._fetcher.fetch(file, part.start, view, self._received)
            try:
                return self._check(file, part, view)
            except InvalidModel:
                if not self._fetcher.distrust(file, part.start):
                    raise

    def _check(self, file: str, part: Part, view: memoryview) -> None:
        manifest = self._remote.manifest
        if manifest is None:
            return
        for piece in part.pieces:
            content = view[piece.start - part.start : piece.end - part.start]
            manifest.check_piece(file, piece, content, f"{self.origin}/{file}")

    def _received(self, nbytes: int) -> None:
        if self._closed:
            raise FetchCancelled
        self._meter.add(nbytes)

    # ---- buffers; the lock is held

    def _view(self, index: int, start: int, end: int) -> memoryview:
        segment = self._segments[index]
        shift = _lead(segment) - segment.start
        return memoryview(self._buffers[index])[start + shift : end + shift]

    def _let_go_if_read(self, index: int) -> None:
        if not self._unread[index] and index in self._buffers:
            del self._buffers[index]
            self._held -= self._segments[index].nbytes


def _lead(segment: Segment) -> int:
    """Unused bytes before a segment, so that tensors are aligned in memory as they are in the file."""
    return segment.start % 64


class _Samples:
    """Sampled pages of every file, kept as they pass: a checkpoint's fingerprint costs no further read."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._lock = threading.Lock()
        self._pages: dict[str, dict[int, bytearray]] = {}
        self._left: dict[tuple[str, int], int] = {}
        """Bytes of a page that have not passed."""
        for file, size in sizes.items():
            pages = {at: bytearray(min(SAMPLE_BYTES, size)) for at in sample_offsets(size)}
            self._pages[file] = pages
            self._left |= {(file, at): len(page) for at, page in pages.items()}

    def keep(self, file: str, start: int, content: memoryview) -> None:
        """These bytes of the file pass, for the only time."""
        for at, page in self._pages[file].items():
            low, high = max(at, start), min(at + len(page), start + len(content))
            if low < high:
                with self._lock:
                    page[low - at : high - at] = content[low - start : high - start]
                    self._left[file, at] -= high - low

    def find(self, file: str, at: int) -> bytearray | None:
        """A page that has passed as a whole."""
        with self._lock:
            return None if self._left.get((file, at), 1) else self._pages[file][at]
