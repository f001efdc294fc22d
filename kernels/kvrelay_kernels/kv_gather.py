"""Whole blocks of a group of layers, to and from one contiguous buffer, and a digest in the same pass.

    buffer[l, kv, i] = pool[l, kv, blocks[i]]        (gather; scatter is the inverse)

One buffer a layer group is what travels between workers in a single message.

The digest of a buffer of n bytes, its words w[0], w[1], ... little-endian 64-bit integers and the last
one padded with zeros, all arithmetic modulo 2^64:

    x = w[i] + (i + 1) * G          y = fold(x, 32) * F          fold(v, s) = v ^ (v >> s)
    a = sum_i fold(y, 29)           b = sum_i fold(fold(y, 29) * S, 32)
    a += n * G;  b ^= scramble(a);  a ^= scramble(b);            digest = a, b   (16 bytes)
    scramble(v) = fold(fold(fold(v, 32) * F, 29) * S, 32)

The sums may be taken in any order, so a copy can be split over threads or programs at will and the
digest costs no pass of its own. A single changed word always changes it: for a fixed i every step from
w[i] to its two terms can be undone (G is added, F and S are odd, a fold by s loses nothing), so the term
changes, one changed term changes a sum, and the steps after the sums can be undone as well. A word in
another place is mixed with another i. Other damage goes unseen with the probability that two
unrelated pairs of words are equal, about 2^-128. It is no defence against forgery.

Sources: multiply-and-fold steps as in Appleby's MurmurHash3 finaliser; summing mixed (index, word) pairs
is the multiset hash of Clarke et al., 2003.
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape
from kvrelay_kernels.cpu.library import cpu_library
from kvrelay_kernels.reference.kv_gather import (
    digest_sums_reference,
    finish_digest,
    kv_gather_reference,
    kv_scatter_reference,
)


def kv_gather(
    layers: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    valid_tokens: int | None = None,
) -> None:
    """Copy blocks of `layers` into `out`, in the order of `blocks`.

    Args:
        layers: `[layers, 2, num_blocks, block_size, kv_heads, head_dim]`, a group of a pool.
        blocks: `[blocks]` int64, physical block indices on the device of `layers`; at least one.
        out: `[layers, 2, blocks, block_size, kv_heads, head_dim]`, contiguous, same dtype and device.
        valid_tokens: the tokens of the last block to copy; zeros are written for the rest. None: all.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _gather(layers, blocks, out, valid_tokens, digest=False)


def kv_gather_digest(
    layers: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    valid_tokens: int | None = None,
) -> bytes:
    """`kv_gather`, and the digest of what `out` then holds. Waits for the device."""
    return finish_digest(gather_and_sum(layers, blocks, out, valid_tokens=valid_tokens), out.nbytes)


def gather_and_sum(
    layers: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    valid_tokens: int | None = None,
) -> torch.Tensor:
    """`kv_gather_digest` up to the digest's sums, `[2]` int64: on a GPU nothing waits for it yet."""
    sums = _gather(layers, blocks, out, valid_tokens, digest=True)
    assert sums is not None  # noqa: S101 - asked for
    return sums


def kv_scatter(layers: torch.Tensor, blocks: torch.Tensor, buffer: torch.Tensor) -> None:
    """Copy `buffer` into distinct blocks of `layers`, in the order of `blocks`.

    Args:
        layers: `[layers, 2, num_blocks, block_size, kv_heads, head_dim]`, a group of a pool.
        blocks: `[blocks]` int64, distinct physical block indices on the device of `layers`.
        buffer: `[layers, 2, blocks, block_size, kv_heads, head_dim]`, same dtype and device.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _scatter(layers, blocks, buffer, digest=False)


def kv_scatter_digest(layers: torch.Tensor, blocks: torch.Tensor, buffer: torch.Tensor) -> bytes:
    """`kv_scatter`, and the digest of `buffer` as it was read. Waits for the device.

    The blocks are written before the digest is known: keep them from every reader until it holds.
    """
    sums = _scatter(layers, blocks, buffer, digest=True)
    assert sums is not None  # noqa: S101 - asked for
    return finish_digest(sums, buffer.nbytes)


def kv_digest(buffer: torch.Tensor) -> bytes:
    """The digest of a contiguous tensor, without a copy elsewhere."""
    return finish_digest(digest_sums_reference(buffer), buffer.nbytes)


def _gather(
    layers: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    valid_tokens: int | None,
    *,
    digest: bool,
) -> torch.Tensor | None:
    _check_buffer("out", layers, blocks, out)
    block_size = layers.shape[3]
    valid = block_size if valid_tokens is None else valid_tokens
    if not 1 <= valid <= block_size:
        raise ValueError(f"{valid} valid tokens in a block of {block_size}")
    if layers.device.type == "cuda" and _in_words(layers):
        from kvrelay_kernels.cuda.kv_gather import kv_gather_cuda

        return kv_gather_cuda(layers, blocks, out, valid_tokens=valid, digest=digest)
    library = cpu_library() if layers.device.type == "cpu" else None
    if library is not None and _in_words(layers):
        from kvrelay_kernels.cpu.kv_gather import kv_gather_cpu

        return kv_gather_cpu(library, layers, blocks, out, valid_tokens=valid, digest=digest)
    kv_gather_reference(layers, blocks, out, valid_tokens=valid)
    return digest_sums_reference(out) if digest else None


def _scatter(
    layers: torch.Tensor, blocks: torch.Tensor, buffer: torch.Tensor, *, digest: bool
) -> torch.Tensor | None:
    _check_buffer("buffer", layers, blocks, buffer)
    if layers.device.type == "cuda" and _in_words(layers):
        from kvrelay_kernels.cuda.kv_gather import kv_scatter_cuda

        return kv_scatter_cuda(layers, blocks, buffer, digest=digest)
    library = cpu_library() if layers.device.type == "cpu" else None
    if library is not None and _in_words(layers):
        from kvrelay_kernels.cpu.kv_gather import kv_scatter_cpu

        return kv_scatter_cpu(library, layers, blocks, buffer, digest=digest)
    kv_scatter_reference(layers, blocks, buffer)
    return digest_sums_reference(buffer) if digest else None


def digests_while_copying(layers: torch.Tensor) -> bool:
    """Whether the digest variants copy these layers in one pass; elsewhere torch takes a second one."""
    if not _in_words(layers):
        return False
    return layers.device.type == "cuda" or cpu_library() is not None


def _in_words(layers: torch.Tensor) -> bool:
    """Whether a token of a block is whole 8-byte words, one block's bytes behind another's."""
    token = layers[0, 0, 0, 0]
    return layers[0, 0].is_contiguous() and token.nbytes % 8 == 0


def _check_buffer(
    name: str, layers: torch.Tensor, blocks: torch.Tensor, buffer: torch.Tensor
) -> None:
    if layers.dim() != 6:
        raise ValueError(f"layers has {layers.dim()} dimensions, expected 6")
    check_shape("blocks", blocks, (None,))
    check_dtype("blocks", blocks, torch.int64)
    check_dtype(name, buffer, layers.dtype)
    check_shape(name, buffer, (*layers.shape[:2], blocks.shape[0], *layers.shape[3:]))
    if not len(blocks):
        raise ValueError("blocks is empty")
    if not buffer.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
