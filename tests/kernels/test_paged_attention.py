"""Paged attention against a row-by-row float64 oracle."""

import pytest
import torch

from kvrelay_kernels import paged_attention as op
from kvrelay_kernels.reference import paged_attention as reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def oracle(
    query, key_cache, value_cache, tables, query_lens, context_lens, scale, window=None, cap=None
):
    """The formula of the module, one query head of one row at a time."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    block_size, kv_heads = key_cache.shape[1:3]
    group = query.shape[1] // kv_heads
    row = 0
    for table, new, context in zip(tables, query_lens, context_lens, strict=True):
        blocks = table[: -(-context // block_size)].long()
        keys = key_cache[blocks].flatten(0, 1)[:context].double()
        values = value_cache[blocks].flatten(0, 1)[:context].double()
        for position in range(context - new, context):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(query.shape[1]):
                k = keys[first : position + 1, head // group]
                v = values[first : position + 1, head // group]
                scores = scale * (k @ query[row, head].double())
                if cap is not None:
                    scores = cap * (scores / cap).tanh()
                out[row, head] = scores.softmax(0) @ v
            row += 1
    return out


def make_case(query_lens, context_lens, *, heads, kv_heads, head_dim, block_size, dtype, seed=0):
    """Caches full of noise, and distinct shuffled blocks for every sequence."""
    torch.manual_seed(seed)
    needed = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks).int()
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    start = 0
    for row, count in zip(tables, needed, strict=True):
        row[:count] = order[start : start + count]
        start += count
    shape = (num_blocks, block_size, kv_heads, head_dim)
    key, value = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    query = torch.randn(sum(query_lens), heads, head_dim).to(dtype)
    return query, key, value, tables


BATCHES = {
    "one decode": ([1], [1]),
    "decodes of mixed lengths": ([1, 1, 1, 1], [1, 16, 17, 70]),
    "a fresh prompt": ([37], [37]),
    "a chunk after a prefix": ([5], [38]),
    "a chunk from a block edge": ([16], [32]),
    "several chunks": ([3, 20, 17], [3, 33, 48]),
    "decodes and chunks": ([1, 1, 6, 2], [40, 3, 6, 35]),
    "a single token among chunks": ([4, 1, 3], [9, 50, 3]),
}


# The compiled kernel takes heads of whole vectors: 8 is computed by torch, 16 by the kernel.
EITHER = pytest.mark.parametrize("head_dim", [8, 16])


@EITHER
@pytest.mark.parametrize("window", [None, 1, 7, 16, 33])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_matches_the_oracle(batch, window, head_dim):
    query_lens, context_lens = batch
    query, key, value, tables = make_case(
        query_lens,
        context_lens,
        heads=6,
        kv_heads=2,
        head_dim=head_dim,
        block_size=16,
        dtype=torch.float32,
    )
    layout = op.attention_layout(tables, query_lens, context_lens)
    out = op.paged_attention(query, key, value, layout, scale=0.3, sliding_window=window)
    expected = oracle(query, key, value, tables, query_lens, context_lens, 0.3, window)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(1, 1, 4, 1), (4, 4, 80, 8), (14, 2, 64, 16)]
)
def test_matches_the_oracle_in_every_dtype_and_head_shape(
    heads, kv_heads, head_dim, block_size, dtype
):
    query_lens, context_lens = [1, 1, 9, 1], [30, 5, 25, 12]
    query, key, value, tables = make_case(
        query_lens,
        context_lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    layout = op.attention_layout(tables, query_lens, context_lens)
    out = op.paged_attention(query, key, value, layout, scale=head_dim**-0.5)
    expected = oracle(
        query, key, value, tables, query_lens, context_lens, head_dim**-0.5, window=None
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_decodes_in_small_groups_equal_one_group(monkeypatch):
    lengths = [3, 90, 17, 16, 1, 64]
    query, key, value, tables = make_case(
        [1] * 6, lengths, heads=4, kv_heads=2, head_dim=8, block_size=16, dtype=torch.float32
    )
    layout = op.attention_layout(tables, [1] * 6, lengths)
    for window in (None, 20):
        whole = op.paged_attention(query, key, value, layout, scale=1.0, sliding_window=window)
        for limit in (1, 12_000, 20_000):
            monkeypatch.setattr(reference, "_CPU_GATHER_BYTES", limit)
            split = op.paged_attention(query, key, value, layout, scale=1.0, sliding_window=window)
            torch.testing.assert_close(split, whole)
        monkeypatch.undo()


@EITHER
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_soft_capped_scores_match_the_oracle(batch, head_dim):
    shape = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": head_dim,
        "block_size": 8,
        "dtype": torch.float32,
    }
    case = make_case(*batch, **shape)
    layout = op.attention_layout(case[3], *batch)
    out = op.paged_attention(*case[:3], layout, scale=1.0, sliding_window=20, soft_cap=3.0)
    expected = oracle(*case, *batch, 1.0, window=20, cap=3.0)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@EITHER
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 5, 20])
def test_nothing_of_another_sequence_is_touched(window, cap, head_dim):
    """Padding and the unused tails of blocks may hold anything, NaN included."""
    query_lens, context_lens = [1, 1, 1, 5, 3], [3, 37, 16, 21, 3]
    shape = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": head_dim,
        "block_size": 8,
        "dtype": torch.float32,
    }
    query, key, value, tables = make_case(query_lens, context_lens, **shape)
    layout = op.attention_layout(tables, query_lens, context_lens)
    options = {"scale": 1.0, "sliding_window": window, "soft_cap": cap}
    clean = op.paged_attention(query, key, value, layout, **options)
    used = torch.zeros(key.shape[:2], dtype=torch.bool)
    for table, context in zip(tables, context_lens, strict=True):
        positions = torch.arange(context)
        used[table[positions // 8].long(), positions % 8] = True
    assert not used[0].all()
    key[~used], value[~used] = float("nan"), float("inf")
    dirty = torch.full_like(clean, float("nan"))
    assert op.paged_attention(query, key, value, layout, **options, out=dirty) is dirty
    assert torch.equal(clean, dirty)


@EITHER
def test_queries_may_be_a_view_of_a_fused_projection(head_dim):
    query, key, value, tables = make_case(
        [1, 5], [9, 20], heads=4, kv_heads=2, head_dim=head_dim, block_size=4, dtype=torch.float32
    )
    fused = torch.cat((query, torch.randn(6, 4, head_dim)), dim=1)
    layout = op.attention_layout(tables, [1, 5], [9, 20])
    view = op.paged_attention(fused[:, :4], key, value, layout, scale=1.0)
    torch.testing.assert_close(view, op.paged_attention(query, key, value, layout, scale=1.0))


def test_wrong_shapes_are_named():
    query, key, value, tables = make_case(
        [2], [2], heads=4, kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32
    )
    layout = op.attention_layout(tables, [2], [2])
    with pytest.raises(ValueError, match=r"query has shape \[1, 4, 8\], expected \[2, \*, 8\]"):
        op.paged_attention(query[:1], key, value, layout, scale=1.0)
    with pytest.raises(ValueError, match="value_cache"):
        op.paged_attention(query, key, value[:1], layout, scale=1.0)
    with pytest.raises(ValueError, match="dtype"):
        op.paged_attention(query.half(), key, value, layout, scale=1.0)
    with pytest.raises(ValueError, match="3 query heads do not divide into 2"):
        op.paged_attention(query[:, :3], key, value, layout, scale=1.0)
    for options, message in (
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
        ({"out": query[:1]}, r"out has shape \[1, 4, 8\]"),
        ({"out": query.half()}, "out has dtype"),
        ({"out": torch.empty(2, 4, 16)[..., ::2]}, "out is not contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            op.paged_attention(query, key, value, layout, scale=1.0, **options)
    with pytest.raises(ValueError, match="block_tables"):
        op.attention_layout(tables, [1, 1], [2, 2])
