"""Head normalisation, rotation and the write into the pool in Triton, in one pass over each token.

A program takes some heads of one token. A head is held as the two halves of its rotated part and the
rest behind them, so that each member of a rotated pair is read once, before the queries change in
place.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvrelay_kernels.cuda.launch import overlap
from kvrelay_kernels.cuda.registry import AotCase, Expect, Workload

HEADS = 8
"""Heads of a program."""
_FP8_LARGEST = tl.constexpr(448.0)


@triton.jit
def _weighted(
    part: tl.tensor,
    scale: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    is_query: tl.tensor,
    like: tl.tensor,
) -> tl.tensor:
    """RMSNorm of one part of the heads, rounded where the reference rounds."""
    weight = tl.where(
        is_query[:, None],
        tl.load(query_norm + at, mask=inside, other=0.0).to(tl.float32)[None, :],
        tl.load(key_norm + at, mask=inside, other=0.0).to(tl.float32)[None, :],
    )
    return ((part * scale).to(like.dtype).to(tl.float32) * weight).to(like.dtype).to(tl.float32)


@triton.jit
def _to_cache(part: tl.tensor, scale: tl.tensor, cache: tl.tensor, FP8: tl.constexpr) -> tl.tensor:
    if FP8:
        # Saturated here: a cast alone gives NaN past the largest number on some targets.
        part = tl.minimum(tl.maximum(part * scale, -_FP8_LARGEST), _FP8_LARGEST)
    return part.to(cache.dtype.element_ty)


@triton.jit
def _rotary_kv_write_kernel(
    qkv: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slots: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    eps: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    query_heads: tl.tensor,
    kv_heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    ANGLES: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_query = head < query_heads
    is_key = (head >= query_heads) & (head < query_heads + kv_heads)
    is_value = (head >= query_heads + kv_heads) & (head < query_heads + 2 * kv_heads)
    exists = (is_query | is_key | is_value)[:, None]
    turned = (is_query | is_key)[:, None]
    half = tl.arange(0, HALF)
    in_half = half < ANGLES
    rest = 2 * ANGLES + tl.arange(0, REST)
    in_rest = rest < HEAD_DIM
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    start = qkv + token * token_stride + head[:, None] * head_stride
    first_at = start + half[None, :]
    second_at = first_at + ANGLES
    rest_at = start + rest[None, :]
    half_mask = exists & in_half[None, :]
    rest_mask = exists & in_rest[None, :]
    first_as_stored = tl.load(first_at, mask=half_mask, other=0.0)
    first = first_as_stored.to(tl.float32)
    second = tl.load(second_at, mask=half_mask, other=0.0).to(tl.float32)
    tail = tl.load(rest_at, mask=rest_mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1) + tl.sum(tail * tail, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        like = first_as_stored
        first_normed = _weighted(first, scale, query_norm, key_norm, half, in_half, is_query, like)
        second_normed = _weighted(
            second, scale, query_norm, key_norm, half + ANGLES, in_half, is_query, like
        )
        tail_normed = _weighted(tail, scale, query_norm, key_norm, rest, in_rest, is_query, like)
        first = tl.where(turned, first_normed, first)
        second = tl.where(turned, second_normed, second)
        tail = tl.where(turned, tail_normed, tail)
    c = tl.load(cos + token * ANGLES + half, mask=in_half, other=1.0)[None, :]
    s = tl.load(sin + token * ANGLES + half, mask=in_half, other=0.0)[None, :]
    turned_first = tl.where(turned, first * c - second * s, first)
    turned_second = tl.where(turned, second * c + first * s, second)

    # A thread that holds a copy of another's element must have read it before that one stores.
    tl.debug_barrier()
    query_mask = is_query[:, None] & in_half[None, :]
    tl.store(first_at, turned_first, mask=query_mask)
    tl.store(second_at, turned_second, mask=query_mask)
    if NORM:
        tl.store(rest_at, tail, mask=is_query[:, None] & in_rest[None, :])

    # A stored key is rounded to the activations' precision first, like the query it will meet.
    turned_first = turned_first.to(first_as_stored.dtype).to(tl.float32)
    turned_second = turned_second.to(first_as_stored.dtype).to(tl.float32)
    slot = tl.load(slots + token)
    key_head = head - query_heads
    value_head = key_head - kv_heads
    keys = key_cache + (slot * kv_heads + key_head[:, None]) * HEAD_DIM
    values = value_cache + (slot * kv_heads + value_head[:, None]) * HEAD_DIM
    key_half = is_key[:, None] & in_half[None, :]
    value_half = is_value[:, None] & in_half[None, :]
    tl.store(keys + half[None, :], _to_cache(turned_first, key_scale, keys, FP8), mask=key_half)
    tl.store(
        keys + ANGLES + half[None, :],
        _to_cache(turned_second, key_scale, keys, FP8),
        mask=key_half,
    )
    tl.store(
        keys + rest[None, :],
        _to_cache(tail, key_scale, keys, FP8),
        mask=is_key[:, None] & in_rest[None, :],
    )
    tl.store(
        values + half[None, :], _to_cache(turned_first, value_scale, values, FP8), mask=value_half
    )
    tl.store(
        values + ANGLES + half[None, :],
        _to_cache(turned_second, value_scale, values, FP8),
        mask=value_half,
    )
    tl.store(
        values + rest[None, :],
        _to_cache(tail, value_scale, values, FP8),
        mask=is_value[:, None] & in_rest[None, :],
    )


def rotary_kv_write_cuda(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """`kvrelay_kernels.rotary_kv_write.rotary_kv_write` on a GPU.

    Args:
        qkv: and the other tensors as in the public function; heads contiguous.
        key_cache: and `value_cache` may also be float8_e4m3fn, which saturates at 448.
        value_cache: like `key_cache`.
        slots: where each token goes.
        cos: cosines.
        sin: sines.
        query_norm: weight of the queries' RMSNorm; present where `key_norm` is.
        key_norm: weight of the keys' RMSNorm.
        eps: of both norms.
        key_scale: stored keys are `key / key_scale`, in a float8 cache only.
        value_scale: the same for the values.

    Raises:
        ValueError: one norm without the other, a cache or heads that are not contiguous.
    """
    tokens, heads, head_dim = qkv.shape
    kv_heads = key_cache.shape[2]
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm come together")
    if qkv.stride(2) != 1 or not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("heads and caches must be contiguous")
    if not tokens:
        return
    angles = cos.shape[1]
    _rotary_kv_write_kernel[tokens, triton.cdiv(heads, HEADS)](
        qkv,
        qkv.stride(0),
        qkv.stride(1),
        key_cache,
        value_cache,
        slots,
        cos.contiguous(),
        sin.contiguous(),
        query_norm,
        key_norm,
        eps,
        1.0 / key_scale,
        1.0 / value_scale,
        heads - 2 * kv_heads,
        kv_heads,
        HEAD_DIM=head_dim,
        ANGLES=angles,
        HALF=triton.next_power_of_2(max(angles, 1)),
        REST=triton.next_power_of_2(max(head_dim - 2 * angles, 1)),
        HEADS=HEADS,
        NORM=query_norm is not None,
        FP8=key_cache.dtype == torch.float8_e4m3fn,
        num_warps=2,
        **overlap(qkv),
    )


_VECTORS = {"ld.global 16B": 2, "st.global 16B": 2}
_OVERLAPPED = Expect({**_VECTORS, "griddepcontrol": 2}, 4, {"launch_pdl": True}, {"PDL": True})


def aot_cases() -> list[AotCase]:
    """Heads of 128 dimensions, with and without their norm, into caches of each dtype."""
    return [
        _case(name, pointer, cache, norm=norm)
        for name, pointer, cache in (
            ("bfloat16", "*bf16", "*bf16"),
            ("float16", "*fp16", "*fp16"),
            ("float32", "*fp32", "*fp32"),
            ("bfloat16, float8 cache", "*bf16", "*fp8e4nv"),
        )
        for norm in (False, True)
    ]


def _case(name: str, pointer: str, cache: str, *, norm: bool) -> AotCase:
    norms = ("query_norm", "key_norm")
    fp8 = cache == "*fp8e4nv"
    expect = {90: _OVERLAPPED, 100: _OVERLAPPED}
    if not fp8:  # which the A100 has no conversion for
        expect[80] = Expect(_VECTORS, 4, constexprs={"PDL": False})
    return AotCase(
        kernel=_rotary_kv_write_kernel,
        variant=f"{name}{', head norm' if norm else ''}",
        signature={
            "qkv": pointer,
            **dict.fromkeys(("token_stride", "head_stride"), "i64"),
            **dict.fromkeys(("key_cache", "value_cache"), cache),
            "slots": "*i64",
            **dict.fromkeys(("cos", "sin"), "*fp32"),
            **(dict.fromkeys(norms, pointer) if norm else {}),
            **dict.fromkeys(("eps", "key_scale", "value_scale"), "fp32"),
            **dict.fromkeys(("query_heads", "kv_heads"), "i32"),
        },
        constexprs={
            "HEAD_DIM": 128,
            "ANGLES": 64,
            "HALF": 64,
            "REST": 1,
            "HEADS": HEADS,
            "NORM": norm,
            "FP8": fp8,
            **({} if norm else dict.fromkeys(norms)),
        },
        divisible=(
            *("qkv", "token_stride", "head_stride", "key_cache", "value_cache", "slots"),
            *("cos", "sin", "query_heads"),
            *(norms if norm else ()),
        ),
        options={"num_warps": 2},
        expect=expect,
    )


def workloads() -> list[Workload]:
    """Decode and prefill batches of an 8B model: 32 query and 8 KV heads of 128."""
    rows = (1, 256, 8192)
    heads, kv_heads, head_dim = 32, 8, 128
    # All heads in; queries back, keys and values into the cache; cosines, sines and the slot.
    token_bytes = 2 * (heads + 2 * kv_heads) * head_dim * 2 + 2 * head_dim // 2 * 4 + 8
    return [
        Workload(
            op="rotary_kv_write",
            kernels=("rotary_kv_write",),
            shape=f"{tokens} tokens, {heads}/{kv_heads} heads of {head_dim}",
            bytes=tokens * token_bytes,
            flops=6 * tokens * (heads + kv_heads) * head_dim,
            expected_share=0.75,
            because="one pass, scattered rows of 2 KiB; one token is the launch, a slot and its rows",
            latency_us=2.0,
        )
        for tokens in rows
    ]
