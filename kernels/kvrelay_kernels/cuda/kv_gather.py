"""Blocks between the pool and one buffer in Triton, with their digest taken on the way.

A program copies 16 KiB of one block as 8-byte words, whatever the pool's dtype, and adds its two sums of
the digest to one of a few accumulators; addition modulo 2^64 does not care about the order.
"""

import torch
import triton
import triton.language as tl

from kvrelay_kernels.cuda.registry import TARGETS, AotCase, Expect, Workload
from kvrelay_kernels.reference.kv_gather import FIRST, GOLDEN, SECOND

WORDS = 2048
"""Words of a program."""
_ACCUMULATORS = 64

_GOLDEN = tl.constexpr(GOLDEN)
_FIRST = tl.constexpr(FIRST)
_SECOND = tl.constexpr(SECOND)


@triton.jit
def _kv_copy_kernel(
    layers: tl.tensor,
    layer_stride: tl.tensor,
    half_stride: tl.tensor,
    blocks: tl.tensor,
    num_blocks: tl.tensor,
    buffer: tl.tensor,
    block_words: tl.tensor,
    valid_words: tl.tensor,
    sums: tl.tensor,
    SCATTER: tl.constexpr,
    DIGEST: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = row % num_blocks
    half = row // num_blocks
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = at < block_words
    block = layers + (half // 2) * layer_stride + (half % 2) * half_stride
    block += tl.load(blocks + place) * block_words
    packed = buffer + row * block_words
    if SCATTER:
        words = tl.load(packed + at, mask=inside, other=0)
        tl.store(block + at, words, mask=inside)
    else:
        valid = tl.where(place == num_blocks - 1, valid_words, block_words)
        words = tl.load(block + at, mask=inside & (at < valid), other=0)
        tl.store(packed + at, words, mask=inside)
    if DIGEST:
        index = (row * block_words + at + 1).to(tl.uint64)
        x = words.to(tl.uint64, bitcast=True) + index * _GOLDEN
        y = (x ^ (x >> 32)) * _FIRST
        y = y ^ (y >> 29)
        z = y * _SECOND
        z = z ^ (z >> 32)
        first = tl.sum(tl.where(inside, y.to(tl.int64, bitcast=True), 0), axis=0)
        second = tl.sum(tl.where(inside, z.to(tl.int64, bitcast=True), 0), axis=0)
        slot = sums + 2 * ((row + tl.program_id(1)) % ACCUMULATORS)
        tl.atomic_add(slot, first, sem="relaxed")
        tl.atomic_add(slot + 1, second, sem="relaxed")


def kv_gather_cuda(
    layers: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    *,
    valid_tokens: int,
    digest: bool,
) -> torch.Tensor | None:
    """Gather; the digest's sums, `[2]` int64 on the device, if asked for."""
    return _copy(layers, blocks, out, valid_tokens, scatter=False, digest=digest)


def kv_scatter_cuda(
    layers: torch.Tensor, blocks: torch.Tensor, buffer: torch.Tensor, *, digest: bool
) -> torch.Tensor | None:
    """Scatter; the digest's sums, `[2]` int64 on the device, if asked for."""
    return _copy(layers, blocks, buffer, layers.shape[3], scatter=True, digest=digest)


def _copy(
    layers: torch.Tensor,
    blocks: torch.Tensor,
    buffer: torch.Tensor,
    valid_tokens: int,
    *,
    scatter: bool,
    digest: bool,
) -> torch.Tensor | None:
    words = layers.view(torch.int64)
    block_words = words[0, 0, 0].numel()
    sums = None
    if digest:
        sums = torch.zeros((_ACCUMULATORS, 2), dtype=torch.int64, device=layers.device)
    rows = layers.shape[0] * 2 * len(blocks)
    _kv_copy_kernel[rows, triton.cdiv(block_words, WORDS)](
        words,
        words.stride(0),
        words.stride(1),
        blocks,
        len(blocks),
        buffer.view(torch.int64),
        block_words,
        block_words // layers.shape[3] * valid_tokens,
        sums,
        SCATTER=scatter,
        DIGEST=digest,
        ACCUMULATORS=_ACCUMULATORS,
        WORDS=WORDS,
        num_warps=8,
    )
    return None if sums is None else sums.sum(0)


def aot_cases() -> list[AotCase]:
    """Every combination of direction and digest; a word has no dtype."""
    expect = Expect(instructions={"ld.global 16B": 2, "st.global 16B": 2}, blocks_per_sm=4)
    return [
        AotCase(
            kernel=_kv_copy_kernel,
            variant=("scatter" if scatter else "gather") + (", digest" if digest else ""),
            signature={
                "layers": "*i64",
                **dict.fromkeys(("layer_stride", "half_stride"), "i64"),
                "blocks": "*i64",
                "num_blocks": "i32",
                "buffer": "*i64",
                **dict.fromkeys(("block_words", "valid_words"), "i32"),
                **({"sums": "*i64"} if digest else {}),
            },
            constexprs={
                "SCATTER": scatter,
                "DIGEST": digest,
                "ACCUMULATORS": _ACCUMULATORS,
                "WORDS": WORDS,
                **({} if digest else {"sums": None}),
            },
            divisible=(
                *("layers", "layer_stride", "half_stride", "blocks", "buffer"),
                *("block_words", "valid_words"),
                *(("sums",) if digest else ()),
            ),
            options={"num_warps": 8},
            expect=dict.fromkeys(TARGETS, expect),
        )
        for scatter in (False, True)
        for digest in (False, True)
    ]


def workloads() -> list[Workload]:
    """One message of 4 layers of a 4k prompt of an 8B model, 64 MiB."""
    payload = 4 * 2 * 4096 * 8 * 128 * 2
    return [
        Workload(
            op=op,
            kernels=("kv_copy",),
            shape="4 layers of 4096 tokens",
            bytes=2 * payload,
            # Two multiplications, two additions to the sums and seven cheap operations a word.
            flops=11 * payload // 8,
            expected_share=0.8,
            because="the integer work of the digest is about half of what the copy's time allows",
        )
        for op in ("kv_gather_digest", "kv_scatter_digest")
    ]
