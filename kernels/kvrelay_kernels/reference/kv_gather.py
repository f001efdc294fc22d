"""Moving whole blocks, and their digest, in torch."""

import torch

GOLDEN = 0x9E3779B97F4A7C15
FIRST = 0xD6E8FEB86659FD93
SECOND = 0xFF51AFD7ED558CCD
_MASK = (1 << 64) - 1
_CHUNK = 1 << 15
"""Words taken at a time, so that what a step leaves is in cache for the next."""


def kv_gather_reference(
    layers: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor, *, valid_tokens: int
) -> None:
    """`kvrelay_kernels.kv_gather.kv_gather` on any device."""
    torch.index_select(layers, 2, blocks, out=out)
    out[:, :, -1, valid_tokens:] = 0


def kv_scatter_reference(layers: torch.Tensor, blocks: torch.Tensor, buffer: torch.Tensor) -> None:
    """`kvrelay_kernels.kv_gather.kv_scatter` on any device."""
    layers.index_copy_(2, blocks, buffer)


def digest_sums_reference(payload: torch.Tensor) -> torch.Tensor:
    """The two sums of the digest, `[2]` int64, of a contiguous tensor on any device."""
    data = payload.reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    # Words may begin at any address, which a view of another type may not.
    words = data[:whole].clone().view(torch.int64)
    if whole < data.numel():
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[: data.numel() - whole] = data[whole:]
        words = torch.cat((words, last.view(torch.int64)))
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    for first in range(0, len(words), _CHUNK):
        chunk = words[first : first + _CHUNK]
        index = torch.arange(first + 1, first + 1 + len(chunk), device=data.device)
        mixed = _multiply(_fold(chunk + index * _signed(GOLDEN), 32), FIRST)
        mixed = _fold(mixed, 29)
        sums[0] += mixed.sum()
        sums[1] += _fold(_multiply(mixed, SECOND), 32).sum()
    return sums


def finish_digest(sums: torch.Tensor, nbytes: int) -> bytes:
    """16 bytes of the digest, from its sums and the payload's size. Waits for the device."""
    first, second = (int(value) & _MASK for value in sums.tolist())
    # Each step can be undone, so different sums of one size stay different.
    first = (first + nbytes * GOLDEN) & _MASK
    second ^= _scramble(first)
    first ^= _scramble(second)
    return first.to_bytes(8, "little") + second.to_bytes(8, "little")


def _scramble(value: int) -> int:
    value = ((value ^ value >> 32) * FIRST) & _MASK
    value = ((value ^ value >> 29) * SECOND) & _MASK
    return value ^ value >> 32


def _fold(words: torch.Tensor, shift: int) -> torch.Tensor:
    """`words ^ (words >> shift)` of unsigned words."""
    return words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))


def _multiply(words: torch.Tensor, factor: int) -> torch.Tensor:
    return words * _signed(factor)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
