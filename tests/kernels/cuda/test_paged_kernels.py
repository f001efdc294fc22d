"""The Triton attention kernels and their tile map against the torch reference."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kvrelay_kernels.cuda import paged_decode, paged_prefill
from kvrelay_kernels.cuda.paged_attention import paged_attention_cuda
from kvrelay_kernels.cuda.paged_decode import DecodeConfig, paged_decode_cuda
from kvrelay_kernels.cuda.paged_prefill import PrefillConfig, paged_prefill_cuda
from kvrelay_kernels.cuda.paged_softmax import AttentionTraits
from kvrelay_kernels.cuda.paged_tile_map import decode_tile_map, prefill_tile_map
from kvrelay_kernels.layout import attention_layout
from kvrelay_kernels.reference.paged_attention import paged_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: the interpreter has no such dot")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_case(
    query_lens, context_lens, *, heads=4, kv_heads=2, head_dim=16, page=16, dtype=torch.float32
):
    """Shuffled pages for every sequence; slots that no sequence owns hold NaN."""
    torch.manual_seed(0)
    needed = [-(-length // page) for length in context_lens]
    order = torch.randperm(sum(needed) + 3).int()
    tables = torch.zeros(len(needed), max(needed) + 1, dtype=torch.int32)
    shape = (len(order), page, kv_heads, head_dim)
    key, value = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    start = 0
    for table, length, count in zip(tables, context_lens, needed, strict=True):
        table[:count] = order[start : start + count]
        start += count
        place = torch.arange(length)
        slots = table[place // page].long(), place % page
        key[slots] = torch.randn(length, kv_heads, head_dim)
        value[slots] = torch.randn(length, kv_heads, head_dim)
    fused = torch.randn(sum(query_lens), heads + 2 * kv_heads, head_dim)
    query = fused.to(DEVICE, dtype)[:, :heads]
    layout = attention_layout(tables.to(DEVICE), query_lens, context_lens)
    return query, key.to(DEVICE, dtype), value.to(DEVICE, dtype), layout


def expected(query, key, value, layout, *, scale, sliding_window=None, soft_cap=None):
    """The reference in float32, where unowned slots are zeros."""
    return paged_attention_reference(
        query.float(),
        key.float().nan_to_num(0),
        value.float().nan_to_num(0),
        layout,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        out=torch.empty(query.shape, device=DEVICE),
    )


def attend(case, *, scale=0.3, decode=None, prefill=None, **settings):
    """The kernels under test on a poisoned output; configurations as the launcher chooses or given."""
    query, key, value, layout = case
    out = torch.full(query.shape, float("nan"), dtype=query.dtype, device=DEVICE)
    if decode is None and prefill is None:
        settings = {"sliding_window": None, "soft_cap": None, **settings}
        return paged_attention_cuda(query, key, value, layout, scale=scale, out=out, **settings)
    given = {"sliding_window": None, "soft_cap": None, "value_scale": 1.0, **settings}
    traits = AttentionTraits.of(query, key, scale=scale, **given)
    if decode is not None and layout.num_decodes:
        paged_decode_cuda(query, key, value, layout, traits, out=out, config=decode)
    if prefill is not None:
        paged_prefill_cuda(query, key, value, layout, traits, out=out, config=prefill)
    return out


def check(case, *, scale=0.3, decode=None, prefill=None, **settings):
    out = attend(case, scale=scale, decode=decode, prefill=prefill, **settings)
    want = expected(*case, scale=scale, **settings)
    tolerance = TOLERANCE[case[0].dtype]
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=tolerance)


SMALL = DecodeConfig(tile=16, warps=4, stages=2)
"""Many tiles in short contexts: the interpreter takes its time for each."""
SMALL_PREFILL = PrefillConfig(rows=16, tile=16, warps=4)


@pytest.mark.parametrize("page", [8, 16, 32, 64, 128])
def test_decode_matches_at_every_page_size(page):
    check(make_case([1] * 2, [63, 130], page=page))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 16), (4, 1, 16), (6, 2, 24), (17, 1, 16), (2, 2, 8)]
)
def test_decode_matches_in_every_head_shape(heads, kv_heads, head_dim):
    case = make_case([1] * 2, [20, 17], heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    check(case, decode=SMALL)


@pytest.mark.parametrize("context", [1, 16, 17, 32, 33])
def test_decode_matches_around_tile_edges(context):
    check(make_case([1], [context]), decode=SMALL)


@pytest.mark.parametrize(
    ("window", "page"), [(1, 8), (5, 16), (16, 16), (17, 8), (40, 16), (90, 8)]
)
def test_decode_sees_its_window_only(window, page):
    check(make_case([1] * 3, [50, 16, 33], page=page), decode=SMALL, sliding_window=window)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_decode_caps_its_scores(soft_cap):
    check(make_case([1] * 2, [50, 3]), decode=SMALL, soft_cap=soft_cap, scale=2.0)


def test_decode_merges_a_sequence_split_over_all_programs():
    config = DecodeConfig(tile=16, warps=4, stages=2, programs_per_sm=10)
    check(make_case([1] * 3, [3, 250, 16], heads=1, kv_heads=1), decode=config)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)])
def test_half_precision_matches(dtype):
    check(make_case([1, 1, 20], [33, 100, 50], dtype=dtype, page=64))


def test_padding_rows_of_a_captured_batch_become_zeros():
    case = make_case([1] * 9, [40, 0, 7, 0, 0, 0, 0, 0, 0])
    out = attend(case)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(out[3:], torch.zeros_like(out[3:]))
    real = make_case([1] * 2, [40, 7])
    rows = [0, 2]
    layout = replace(
        real[3],
        block_tables=case[3].block_tables[rows],
        context_lens=case[3].context_lens[rows],
    )
    want = expected(case[0][rows], case[1], case[2], layout, scale=0.3)
    torch.testing.assert_close(out[rows], want, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9),
    reason="float8_e4m3fn needs compute capability 8.9",
)
def test_an_fp8_cache_is_scaled_back():
    query, key, value, layout = make_case([1, 1, 18], [40, 5, 30], dtype=torch.float16)
    keys, values = (t.float().nan_to_num(0) for t in (key, value))
    stored = (
        query,
        (keys / 0.5).to(torch.float8_e4m3fn),
        (values / 0.25).to(torch.float8_e4m3fn),
        layout,
    )
    out = attend(stored, key_scale=0.5, value_scale=0.25)
    want = expected(query, stored[1].float() * 0.5, stored[2].float() * 0.25, layout, scale=0.3)
    torch.testing.assert_close(out.float(), want, atol=4e-3, rtol=4e-3)


PREFILLS = {
    "a fresh prompt": ([37], [37]),
    "a chunk after a prefix": ([5], [38]),
    "from a tile's edge": ([16], [32]),
    "one token": ([1], [20]),
    "prompts of mixed lengths": ([3, 20, 1, 17], [3, 33, 16, 48]),
}


@pytest.mark.parametrize("window", [None, 1, 9, 33])
@pytest.mark.parametrize("lengths", PREFILLS.values(), ids=PREFILLS.keys())
def test_prefill_matches(lengths, window):
    query, key, value, layout = make_case(*lengths, page=8)
    case = query, key, value, replace(layout, num_decodes=0)
    check(case, prefill=SMALL_PREFILL, sliding_window=window)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 16), (6, 2, 24), (7, 1, 16)])
@pytest.mark.parametrize("page", [16, 32])
def test_prefill_matches_in_every_head_shape(heads, kv_heads, head_dim, page):
    case = make_case([25, 4], [40, 4], heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page)
    check(case, prefill=SMALL_PREFILL)


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("window", [None, 20])
def test_prefill_through_tensor_descriptors_reads_no_foreign_slot(page, window):
    config = replace(SMALL_PREFILL, tma=True)
    check(make_case([30, 9], [61, 9], page=page), prefill=config, sliding_window=window)


def test_prefill_caps_its_scores():
    check(make_case([20], [50]), prefill=SMALL_PREFILL, soft_cap=0.5, scale=2.0)


def test_decodes_and_prompts_share_a_call():
    check(make_case([1, 1, 9, 40], [100, 5, 9, 90], page=32), sliding_window=70, soft_cap=5.0)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("programs", [1, 7, 33])
@pytest.mark.parametrize("window", [None, 100])
def test_the_map_shares_out_every_tile_evenly(tile, programs, window):
    generator = torch.Generator().manual_seed(tile + programs)
    lengths = torch.randint(0, 300, (150,), generator=generator)
    lengths[::11] = 5000
    lengths[::7] = 0
    first = torch.zeros_like(lengths) if window is None else (lengths - window).clamp(min=0)
    tiles = (-(-lengths // tile) - first // tile).tolist()
    made = decode_tile_map(
        lengths.int().to(DEVICE), programs=programs, tile=tile, sliding_window=window
    )
    assert made.tile_starts.tolist() == [0, *torch.tensor(tiles).cumsum(0).tolist()]
    starts = [made.tile_starts[s].item() + t for s, t in made.work.tolist()]
    shares = [b - a for a, b in pairwise(starts)]
    total = sum(tiles)
    assert (starts[0], starts[-1]) == (0, total)
    assert max(shares) == -(-total // programs)
    assert max(shares) - min(shares) <= 1
    for sequence, tile_in_sequence in made.work.tolist()[:-1]:
        assert tile_in_sequence < tiles[sequence]


def test_with_fewer_tiles_than_programs_each_busy_one_has_one():
    lengths = torch.tensor([0, 40, 0, 16], dtype=torch.int32, device=DEVICE)
    made = decode_tile_map(lengths, programs=6, tile=16, sliding_window=None)
    assert made.work.tolist() == [[1, 0], [1, 1], [1, 2], [3, 0], [4, 0], [4, 0], [4, 0]]
    empty = decode_tile_map(lengths * 0, programs=3, tile=16, sliding_window=None)
    assert empty.work.tolist() == [[4, 0]] * 4


def test_prefill_work_names_every_tile_once():
    starts = torch.tensor([3, 3, 20, 21, 53], dtype=torch.int32, device=DEVICE)
    made = prefill_tile_map(starts, programs=5, tile=16)
    assert made.work.tolist()[:-1] == [[1, 0], [1, 1], [2, 0], [3, 0], [3, 1]]


def test_layers_share_what_the_first_one_made_and_a_new_layout_starts_afresh():
    query, key, value, layout = make_case([1, 8], [40, 8])
    attend((query, key, value, layout))
    made = dict(layout.derived)
    attend((query, key, value, layout))
    assert made.keys() == layout.derived.keys()
    assert all(layout.derived[name] is made[name] for name in made)
    assert replace(layout).derived == {}


def test_what_the_kernels_do_not_take_is_named():
    query, key, value, layout = make_case([1], [3])
    with pytest.raises(ValueError, match=r"scale is 0\.0, expected more than 0"):
        attend((query, key, value, layout), scale=0)
    with pytest.raises(ValueError, match=r"key_cache has dtype torch\.float64"):
        attend((query, key.double(), value.double(), layout))
    with pytest.raises(ValueError, match="key_cache is not contiguous"):
        attend((query, key.transpose(0, 1), value, layout))
    with pytest.raises(ValueError, match="last dimension of query"):
        attend((query.transpose(1, 2), key, value, layout))


@NEEDS_GPU
@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (16, 8, 256), (12, 4, 80)]
)
@pytest.mark.parametrize("window", [None, 700])
def test_model_shapes_match_on_a_gpu(heads, kv_heads, head_dim, page, window):
    """Repeated: a merge that ran too early would not fail every time."""
    case = make_case(
        [1, 1, 1, 1, 700, 33],
        [4097, 1, 640, 63, 1500, 33],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page=page,
        dtype=torch.bfloat16,
    )
    for _ in range(10):
        check(case, scale=head_dim**-0.5, sliding_window=window)


@NEEDS_GPU
def test_a_captured_graph_replays_with_other_lengths():
    query, key, value, layout = make_case([1] * 4, [300, 70, 5, 900], dtype=torch.bfloat16)
    out = torch.empty(query.shape, dtype=query.dtype, device=DEVICE)

    def run(current):
        return paged_attention_cuda(
            query, key, value, current, scale=0.3, sliding_window=None, soft_cap=None, out=out
        )

    run(replace(layout))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(replace(layout))
    for lengths in ([300, 70, 5, 900], [10, 0, 1, 880], [299, 69, 4, 1]):
        layout.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        again = torch.full_like(out, float("nan"))
        paged_attention_cuda(
            query,
            key,
            value,
            replace(layout),
            scale=0.3,
            sliding_window=None,
            soft_cap=None,
            out=again,
        )
        assert torch.equal(out, again)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_configurations_fit_the_kernels(head_dim, capability):
    decode = paged_decode.decode_config(head_dim)
    assert decode.tile & (decode.tile - 1) == 0
    for page in (16, 64, 128):
        prefill = paged_prefill.prefill_config(capability, head_dim, page, group=8)
        assert prefill.rows >= 64
        assert not prefill.tma or page % prefill.tile == 0
