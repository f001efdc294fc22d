"""The compiled attention: against torch in float64, and bit for bit against itself."""

import pytest
import torch

from kvrelay_kernels.cpu.paged_attention import layout_args
from kvrelay_kernels.cpu.tape import Tape
from kvrelay_kernels.paged_attention import attention_layout, paged_attention
from kvrelay_kernels.reference.paged_attention import paged_attention_reference

NAN = float("nan")


class Pool:
    """Sequences of given lengths in shuffled blocks; everything that is theirs to read is finite."""

    def __init__(self, contexts, *, kv_heads, head_dim, dtype=torch.float32, block_size=16):
        self.contexts = contexts
        self.scale = head_dim**-0.5
        blocks = [-(-context // block_size) for context in contexts]
        order = torch.randperm(sum(blocks) + 1).int()
        # Unused places of the table name the last block, which holds NaN alone.
        self.tables = torch.full((len(blocks), max(blocks)), int(order[-1]), dtype=torch.int32)
        shape = (sum(blocks) + 1, block_size, kv_heads, head_dim)
        self.key, self.value = (torch.full(shape, NAN, dtype=dtype) for _ in range(2))
        start = 0
        for row, (count, context) in enumerate(zip(blocks, contexts, strict=True)):
            self.tables[row, :count] = order[start : start + count]
            start += count
            positions = torch.arange(context)
            place = self.tables[row, positions // block_size].long(), positions % block_size
            self.key[place] = torch.randn(context, kv_heads, head_dim).to(dtype)
            self.value[place] = torch.randn(context, kv_heads, head_dim).to(dtype)

    def attend(self, queries, *, ends=None, rows=None, **options):
        """`queries` of each of the sequences in `rows` (all), ending at `ends` (their contexts)."""
        rows = range(len(self.contexts)) if rows is None else rows
        ends = [self.contexts[row] for row in rows] if ends is None else ends
        layout = attention_layout(
            self.tables[list(rows)], [len(query) for query in queries], list(ends)
        )
        packed = torch.cat(queries)
        out = torch.full_like(packed, NAN)
        paged_attention(packed, self.key, self.value, layout, scale=self.scale, out=out, **options)
        return out

    def expected(self, queries, **options):
        layout = attention_layout(self.tables, [len(query) for query in queries], self.contexts)
        packed = torch.cat(queries).double()
        return paged_attention_reference(
            packed,
            # 0 where torch would multiply NaN by 0.
            self.key.double().nan_to_num(0),
            self.value.double().nan_to_num(0),
            layout,
            **{"scale": self.scale, "sliding_window": None, "soft_cap": None, **options},
            out=torch.empty_like(packed),
        )


def draw(lengths, heads, head_dim):
    return [torch.randn(length, heads, head_dim) for length in lengths]


@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 256])
@pytest.mark.usefixtures("library")
def test_every_cache_and_head_matches_torch(head_dim, dtype, block_size):
    torch.manual_seed(head_dim + block_size)
    lengths, contexts = [1, 1, 1, 9, 40], [1, 17, 300, 25, 290]
    for heads, kv_heads in ((1, 1), (6, 2), (7, 1), (26, 2)):
        pool = Pool(
            contexts, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_size=block_size
        )
        queries = draw(lengths, heads, head_dim)
        # The kernel computes in float32 whatever the cache is stored in.
        torch.testing.assert_close(
            pool.attend(queries).double(), pool.expected(queries), atol=5e-6, rtol=5e-6
        )


@pytest.mark.parametrize("options", [{"sliding_window": 300}, {"soft_cap": 5.0}, {}])
@pytest.mark.usefixtures("library")
def test_long_contexts_match_torch(options):
    torch.manual_seed(0)
    pool = Pool([2500, 2049, 2047], kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    queries = draw([1, 70, 300], 10, 64)
    torch.testing.assert_close(
        pool.attend(queries, **options).double(),
        pool.expected(queries, **options),
        atol=5e-6,
        rtol=5e-6,
    )


CHUNKINGS = [[700], [1, 699], [255, 1, 256, 188], [33] * 21 + [7], [96, 97, 95, 412]]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 37}, {"sliding_window": 290}, {"soft_cap": 8.0}], ids=str
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 1), (4, 4), (16, 2)])
def test_a_row_is_the_same_bits_however_it_is_computed(library, heads, kv_heads, options, threads):
    torch.manual_seed(1)
    pool = Pool([700, 90, 1300], kv_heads=kv_heads, head_dim=64, dtype=torch.bfloat16)
    (prompt,) = draw([700], heads, 64)
    whole = pool.attend([prompt], rows=[0], **options)
    library.set_threads(threads)
    for chunking in CHUNKINGS:
        end, parts = 0, []
        for length in chunking:
            rows = prompt[end : end + length]
            end += length
            parts.append(pool.attend([rows], rows=[0], ends=[end], **options))
        assert torch.equal(torch.cat(parts), whole)
    # Decode rows at the edges of chunks, beside a short and a long neighbour.
    for position in (0, 15, 16, 255, 256, 257, 511, 512, 699):
        row = prompt[position : position + 1]
        neighbours = draw([1, 1], heads, 64)
        mixed = pool.attend(
            [neighbours[0], row, neighbours[1]],
            rows=[1, 0, 2],
            ends=[90, position + 1, 1300],
            **options,
        )
        assert torch.equal(mixed[1], whole[position])


def test_a_long_sequence_is_shared_by_threads_without_changing_a_bit(library):
    torch.manual_seed(2)
    pool = Pool([6000, 20, 300, 5000], kv_heads=2, head_dim=64)
    queries = draw([1, 1, 1, 12], 6, 64)
    alone = pool.attend(queries)
    torch.testing.assert_close(alone.double(), pool.expected(queries), atol=5e-6, rtol=5e-6)
    for threads in (2, 4):
        library.set_threads(threads)
        assert torch.equal(pool.attend(queries), alone)


@pytest.mark.parametrize("poison", [NAN, float("inf"), float("-inf"), 3e38])
@pytest.mark.usefixtures("library")
def test_what_a_row_does_not_see_cannot_show(poison):
    """A later token of the same sequence that overflowed must not reach the rows before it."""
    torch.manual_seed(3)
    pool = Pool([300], kv_heads=1, head_dim=32)
    (prompt,) = draw([300], 3, 32)
    clean = pool.attend([prompt])
    for position in (5, 100, 256, 270):
        place = pool.tables[0, position // 16], position % 16
        kept = pool.key[place].clone(), pool.value[place].clone()
        pool.key[place], pool.value[place] = poison, poison
        dirty = pool.attend([prompt])
        windowed = pool.attend([prompt], sliding_window=4)
        pool.key[place], pool.value[place] = kept
        assert torch.equal(dirty[:position], clean[:position])
        assert not dirty[position:].isfinite().all()
        later = windowed[position + 4 :]
        assert torch.equal(later, pool.attend([prompt], sliding_window=4)[position + 4 :])


@pytest.mark.usefixtures("library")
def test_scores_far_apart_give_the_largest_all_weight():
    pool = Pool([40], kv_heads=1, head_dim=16)
    pool.key.nan_to_num_(0).mul_(0)
    place = pool.tables[0, 1], 3
    pool.key[place] = 1e4
    out = pool.attend([torch.ones(1, 2, 16)])
    assert torch.equal(out[0], pool.value[place].expand(2, 16))
    # Minus infinity is no reason for NaN as long as another key is seen.
    pool.key[place] = float("-inf")
    seen = pool.attend([torch.ones(1, 2, 16)])
    assert seen.isfinite().all()


def test_a_recorded_call_sees_the_layout_it_is_pointed_at(library):
    torch.manual_seed(4)
    pool = Pool([50, 400], kv_heads=2, head_dim=16)
    query, out = torch.randn(30, 4, 16), torch.full((30, 4, 16), NAN)
    recorded = attention_layout(pool.tables[:1], [30], [30])
    tape = Tape(library)
    with tape.recording():
        paged_attention(query, pool.key, pool.value, recorded, scale=0.2, out=out)
    assert out.isnan().all()
    for lengths, contexts in (([1, 20], [50, 400]), ([1, 1], [7, 130])):
        now = attention_layout(pool.tables, lengths, contexts)
        layout_args(recorded).point_at(now)
        tape.replay(sum(lengths), 0, len(tape))
        rows = sum(lengths)
        direct = paged_attention(query[:rows], pool.key, pool.value, now, scale=0.2)
        assert torch.equal(out[:rows], direct)
        assert out[rows:].isnan().all()
        out.fill_(NAN)


def test_a_layout_of_another_dtype_is_refused(library):
    pool = Pool([20], kv_heads=1, head_dim=16)
    layout = attention_layout(pool.tables.long(), [1], [20])
    with pytest.raises(ValueError, match="block_tables has dtype"):
        paged_attention(torch.randn(1, 1, 16), pool.key, pool.value, layout, scale=1.0)
