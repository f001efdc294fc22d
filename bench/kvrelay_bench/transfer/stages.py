"""What happens to a message beside its transport, each stage alone, on one thread and cold caches.

Every message has buffers of its own, 128 MiB of them in all, as the staging buffers of a busy worker
are not in any cache either. memcpy copies from one such ring to another: what a single copy could reach.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from kvrelay_bench.transfer.pieces import BLOCK_SIZE, make_pool, piece_of, shuffled_blocks
from kvrelay_transfer.frames import (
    HEADER_SIZE,
    Expected,
    Frame,
    FrameHeader,
    FrameKind,
    open_frame,
    seal,
)
from kvrelay_transfer.staging import page_aligned

T = TypeVar("T")

_RING_BYTES = 128 * 1024 * 1024
_POOL_BLOCKS = 512
_EXPECTED = Expected(secrets.token_bytes(16), secrets.randbits(64), 1, secrets.token_bytes(32))


@dataclass(frozen=True, slots=True)
class StageTimes:
    """10^9 bytes a second of payload, one way; microseconds a message where the payload is not touched."""

    memcpy: float
    gather: float
    """Blocks to one buffer, and the digest of what was copied."""
    scatter: float
    """The buffer to blocks, and the digest again, compared with the sender's."""
    seal_us: float
    """The header and its own digest. Without compiled kernels the payload's digest, too."""
    open_us: float
    """The header checked. Without compiled kernels the payload, too."""


class Stages:
    """Pool and buffers, made once."""

    def __init__(self, *, pool_blocks: int = _POOL_BLOCKS) -> None:
        self._source = make_pool(pool_blocks, seed=0)
        self._target = make_pool(pool_blocks)

    def measure(self, size: int, *, ring_bytes: int = _RING_BYTES) -> StageTimes:
        """One pass over the rings.

        Raises:
            AssertionError: what was scattered is not what was gathered, or its digest is another.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._measure(size, max(2, ring_bytes // size))
        finally:
            torch.set_num_threads(before)

    def _measure(self, size: int, count: int) -> StageTimes:
        piece = piece_of(size)
        count_of_blocks = piece.token_count // BLOCK_SIZE
        blocks = shuffled_blocks(count_of_blocks, self._source.num_blocks, seed=size)
        ring, other = _ring(size, count), _ring(size, count)
        header = FrameHeader(
            FrameKind.KV_GROUP, _EXPECTED.lease_id, _EXPECTED.epoch, _EXPECTED.generation, 0,
            0, piece.layer_count, 0, piece.token_count,
        )  # fmt: skip
        digests: list[bytes | None] = []
        frames: list[Frame] = []

        def gather(buffer: memoryview) -> None:
            payload = buffer[HEADER_SIZE:]
            digests.append(self._source.gather(0, piece.layer_count, blocks, payload, BLOCK_SIZE))

        def sealed(gathered: tuple[memoryview, bytes | None]) -> None:
            seal(gathered[0], header, size, _EXPECTED.key, gathered[1])

        def opened(buffer: memoryview) -> None:
            frames.append(open_frame(buffer, len(buffer), _EXPECTED))

        def scatter(frame: Frame) -> None:
            by_copier = frame.blocks_digest is not None
            found = self._target.scatter(
                0, piece.layer_count, blocks, frame.payload, digest=by_copier
            )
            if found != frame.blocks_digest:
                raise AssertionError("gather and scatter took different digests")

        self._target.tensor.zero_()
        # In the order of a hand-over: each stage works on what the one before it left.
        copy_s = _each_s(lambda pair: _copy(*pair), list(zip(other, ring, strict=True)))
        gather_s = _each_s(gather, ring)
        seal_s = _each_s(sealed, list(zip(ring, digests, strict=True)))
        open_s = _each_s(opened, ring)
        scatter_s = _each_s(scatter, frames)
        index = torch.tensor(blocks)
        moved = self._target.tensor[: piece.layer_count].index_select(2, index)
        wanted = self._source.tensor[: piece.layer_count].index_select(2, index)
        # As bits: random bfloat16 values hold NaN, which equals nothing.
        if not torch.equal(moved.view(torch.int16), wanted.view(torch.int16)):
            raise AssertionError("gather and scatter do not give the same blocks")
        return StageTimes(
            memcpy=size / copy_s / 1e9,
            gather=size / gather_s / 1e9,
            scatter=size / scatter_s / 1e9,
            seal_us=seal_s * 1e6,
            open_us=open_s * 1e6,
        )


def _ring(size: int, count: int) -> list[memoryview]:
    buffers = [memoryview(page_aligned(HEADER_SIZE + size)) for _ in range(count)]
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))  # pages exist before anything is timed
    return buffers


def _copy(target: memoryview, source: memoryview) -> None:
    target[:] = source


def _each_s(stage: Callable[[T], object], items: list[T]) -> float:
    """Seconds of one item, averaged."""
    began = time.perf_counter()
    for item in items:
        stage(item)
    return (time.perf_counter() - began) / len(items)
