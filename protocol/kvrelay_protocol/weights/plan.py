"""Which ranges of which files are fetched, in which order: by layer, coalesced, cut into parts.

A *segment* is one buffer: neighbours in one file that are needed one after the other. A *part* is what
one request fetches of it. A *piece* is what one checksum covers: part of one tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvrelay_protocol.weights.header import StoredTensor
from kvrelay_protocol.weights.source import layer_order

PIECE_BYTES = 4 * 1024 * 1024
"""What one checksum of a new manifest covers."""
PART_BYTES = 16 * 1024 * 1024
SEGMENT_BYTES = 64 * 1024 * 1024
"""Of a segment with several tensors; one tensor is never split over two buffers."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `end` of a file, within one tensor."""

    tensor: str
    index: int
    """Of the tensor's pieces."""
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Part:
    """One request."""

    segment: int
    start: int
    end: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """One buffer."""

    file: str
    start: int
    end: int
    tensors: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def plan_segments(
    tensors: Mapping[str, StoredTensor],
    *,
    part_bytes: int = PART_BYTES,
    piece_bytes: int = PIECE_BYTES,
    segment_bytes: int = SEGMENT_BYTES,
) -> tuple[Segment, ...]:
    """Everything to fetch, in layer order.

    Args:
        tensors: by name.
        part_bytes: the largest request; at least `piece_bytes`.
        piece_bytes: what a checksum covers.
        segment_bytes: the largest buffer, but for tensors that are larger.
    """
    segments: list[Segment] = []
    for names in _runs(tensors, segment_bytes):
        first, last = tensors[names[0]], tensors[names[-1]]
        pieces = [piece for name in names for piece in _pieces(name, tensors[name], piece_bytes)]
        parts = tuple(_parts(len(segments), pieces, part_bytes))
        segments.append(Segment(first.file, first.start, last.end, tuple(names), parts))
    return tuple(segments)


def _runs(tensors: Mapping[str, StoredTensor], limit: int) -> Iterator[list[str]]:
    """Tensors that share a buffer."""

    def place(name: str) -> tuple[tuple[int, int], str, int]:
        return layer_order(name), tensors[name].file, tensors[name].start

    run: list[str] = []
    for name in sorted(tensors, key=place):
        if run and not _follows(tensors[run[0]], tensors[run[-1]], tensors[name], limit):
            yield run
            run = []
        run.append(name)
    if run:
        yield run


def _follows(first: StoredTensor, last: StoredTensor, new: StoredTensor, limit: int) -> bool:
    # Without gaps no byte is fetched twice; the format has no padding between tensors.
    adjacent = new.file == last.file and new.start == last.end
    return adjacent and new.end - first.start <= limit


def _pieces(name: str, tensor: StoredTensor, size: int) -> Iterator[Piece]:
    for index, start in enumerate(range(tensor.start, tensor.end, size)):
        yield Piece(name, index, start, min(start + size, tensor.end))


def _parts(segment: int, pieces: list[Piece], limit: int) -> Iterator[Part]:
    taken: list[Piece] = []
    for piece in pieces:
        if taken and piece.end - taken[0].start > limit:
            yield Part(segment, taken[0].start, taken[-1].end, tuple(taken))
            taken = []
        taken.append(piece)
    if taken:
        yield Part(segment, taken[0].start, taken[-1].end, tuple(taken))
