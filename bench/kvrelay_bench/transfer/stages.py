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
_EXPECTED = Expected(secrets.token_bytes(16), secrets.randbits(64), 1)


@dataclass(frozen=True, slots=True)
class StageRates:
    """10^9 bytes a second of payload, one way."""

    memcpy: float
    gather: float
    digest: float
    """Header and xxh3-128, into the buffer."""
    verify: float
    scatter: float

    @property
    def copies(self) -> float:
        """All but the transport, one after the other on one thread."""
        return 1 / sum(1 / rate for rate in (self.gather, self.digest, self.verify, self.scatter))


class Stages:
    """Pool and buffers, made once."""

    def __init__(self, *, pool_blocks: int = _POOL_BLOCKS) -> None:
        self._source = make_pool(pool_blocks, seed=0)
        self._target = make_pool(pool_blocks)

    def measure(self, size: int, *, ring_bytes: int = _RING_BYTES) -> StageRates:
        """One pass over the rings.

        Raises:
            AssertionError: what was scattered is not what was gathered.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._measure(size, max(2, ring_bytes // size))
        finally:
            torch.set_num_threads(before)

    def _measure(self, size: int, count: int) -> StageRates:
        piece = piece_of(size)
        blocks = shuffled_blocks(piece.block_count, self._source.num_blocks, seed=size)
        ring, other = _ring(size, count), _ring(size, count)
        header = FrameHeader(
            FrameKind.KV_GROUP, _EXPECTED.lease_id, _EXPECTED.epoch, _EXPECTED.generation, 0,
            0, piece.layer_count, 0, piece.block_count,
        )  # fmt: skip
        frames: list[Frame] = []

        def gather(buffer: memoryview) -> None:
            payload = buffer[HEADER_SIZE:]
            self._source.gather(0, piece.layer_count, blocks, payload, BLOCK_SIZE)

        def verify(buffer: memoryview) -> None:
            frames.append(open_frame(buffer, len(buffer), _EXPECTED))

        def scatter(frame: Frame) -> None:
            self._target.scatter(0, piece.layer_count, blocks, frame.payload)

        self._target.tensor.zero_()
        rates = StageRates(
            memcpy=_rate(size, lambda pair: _copy(*pair), list(zip(other, ring, strict=True))),
            gather=_rate(size, gather, ring),
            digest=_rate(size, lambda buffer: seal(buffer, header, size), ring),
            verify=_rate(size, verify, ring),
            scatter=_rate(size, scatter, frames),
        )
        index = torch.tensor(blocks)
        moved = self._target.tensor[: piece.layer_count].index_select(2, index)
        wanted = self._source.tensor[: piece.layer_count].index_select(2, index)
        # As bits: random bfloat16 values hold NaN, which equals nothing.
        if not torch.equal(moved.view(torch.int16), wanted.view(torch.int16)):
            raise AssertionError("gather and scatter do not give the same blocks")
        return rates


def _ring(size: int, count: int) -> list[memoryview]:
    buffers = [memoryview(page_aligned(HEADER_SIZE + size)) for _ in range(count)]
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))  # pages exist before anything is timed
    return buffers


def _copy(target: memoryview, source: memoryview) -> None:
    target[:] = source


def _rate(size: int, stage: Callable[[T], object], items: list[T]) -> float:
    began = time.perf_counter()
    for item in items:
        stage(item)
    return len(items) * size / (time.perf_counter() - began) / 1e9
