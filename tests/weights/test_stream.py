"""The stream by itself, over a fetcher that the test holds: order, memory, and who waits for whom."""

from pathlib import Path

import pytest
from memory_weights import HEAD, KIB, LAYERS, Memory, checkpoint, in_order

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.model_files import ModelFiles
from kvrelay_protocol.weights.plan import plan_segments
from kvrelay_protocol.weights.rate import SLOT_S, RateMeter
from kvrelay_protocol.weights.source import LoadReport, layer_order
from kvrelay_protocol.weights.stream import (
    RemoteFiles,
    StreamedWeights,
    StreamOptions,
)


def stream(tensors, size, fetcher, **options):
    files = RemoteFiles("memory", {"m": size}, {"m": fetcher.content[:HEAD]}, tensors, None)
    return StreamedWeights(files, fetcher, StreamOptions(**options))


def test_tensors_come_in_the_order_of_a_forward_pass():
    tensors, _ = checkpoint()
    order = [layer_order(name) for name in in_order(tensors)]
    assert order[0] == (0, 0)
    assert [layer for rank, layer in order if rank == 1] == [n // 2 for n in range(2 * LAYERS)]
    assert order[-2:] == [(2, 0), (2, 0)]


@pytest.mark.parametrize("streams", [1, 5])
def test_ranges_are_asked_for_in_layer_order_and_every_byte_arrives(streams):
    tensors, size = checkpoint()
    fetcher = Memory(size)
    source = stream(tensors, size, fetcher, streams=streams, part_bytes=8 * KIB)
    source.need(list(tensors))
    for name in in_order(tensors):
        at = tensors[name]
        assert bytes(source.read(name)) == fetcher.content[at.start : at.end]
    assert sum(end - start for start, end in fetcher.asked) == size - HEAD
    if streams == 1:
        owner = {tensor.start: name for name, tensor in tensors.items()}
        ranks = [layer_order(owner[start]) for start, _ in fetcher.asked]
        assert ranks == sorted(ranks)
    report = source.report()
    assert (report.nbytes, report.resumed, report.verified) == (size - HEAD, 0, False)
    source.close()


@pytest.mark.parametrize("part", [8 * KIB, 20 * KIB, 1024 * KIB])
@pytest.mark.parametrize("segment", [8 * KIB, 50 * KIB, 1024 * KIB])
def test_a_plan_covers_every_tensor_once(part, segment):
    tensors, size = checkpoint()
    plan = plan_segments(tensors, part_bytes=part, piece_bytes=4 * KIB, segment_bytes=segment)
    assert sorted(name for s in plan for name in s.tensors) == sorted(tensors)
    pieces = [piece for s in plan for p in s.parts for piece in p.pieces]
    assert sum(piece.end - piece.start for piece in pieces) == size - HEAD
    for s in plan:
        assert [p.start for p in s.parts] == [s.start, *(p.end for p in s.parts[:-1])]
        assert s.parts[-1].end == s.end
        assert all(p.end - p.start <= max(part, 4 * KIB) for p in s.parts)
        assert s.nbytes <= max(segment, 8 * KIB)


def test_no_more_than_the_window_waits_in_memory():
    tensors, size = checkpoint(layers=40)
    fetcher = Memory(size)
    source = stream(tensors, size, fetcher, streams=4, part_bytes=4 * KIB, window_bytes=0)
    source.need(list(tensors))
    largest = max(s.nbytes for s in source._segments)
    for name in in_order(tensors):
        source.read(name)
    # One being read, one that its reader already waits for.
    assert source.peak_bytes <= 2 * largest
    source.close()


def test_a_reader_in_another_order_does_not_stand_still():
    tensors, size = checkpoint()
    fetcher = Memory(size)
    source = stream(tensors, size, fetcher, streams=2, part_bytes=4 * KIB, window_bytes=1)
    source.need(list(tensors))
    for name in reversed(in_order(tensors)):
        at = tensors[name]
        assert bytes(source.read(name)) == fetcher.content[at.start : at.end]
    source.close()


def test_what_nobody_needs_is_not_fetched():
    tensors, size = checkpoint(layers=40, tensor_bytes=1024 * KIB)
    fetcher = Memory(size)
    fetcher.gate.clear()
    source = stream(tensors, size, fetcher, streams=1, window_bytes=64 * 1024 * KIB)
    needed = [name for name in in_order(tensors) if layer_order(name) == (1, 3)]
    source.need(needed)
    fetcher.gate.set()
    for name in needed:
        source.read(name)
    # The one under way when `need` came, and the one that has layer 3.
    assert len({s.start for s in source._segments if s.start in {a for a, _ in fetcher.asked}}) <= 2
    with pytest.raises(KeyError):
        source.read("model.norm.weight")
    source.close()


def test_a_failed_range_reaches_the_reader():
    class Failing(Memory):
        def fetch(self, file, start, into, received):
            raise InvalidModel("gone")

    tensors, size = checkpoint()
    source = stream(tensors, size, Failing(size), streams=3)
    with pytest.raises(InvalidModel, match="gone"):
        source.read("model.embed_tokens.weight")
    source.close()


def test_pages_for_the_fingerprint_are_kept_as_they_pass():
    tensors, size = checkpoint()
    fetcher = Memory(size)
    source = stream(tensors, size, fetcher, streams=3, part_bytes=4 * KIB)
    source.need(list(tensors))
    for name in in_order(tensors):
        source.read(name)
    asked = len(fetcher.asked)
    for start in (0, size - 4096):
        assert source.read_range("m", start, 4096) == fetcher.content[start : start + 4096]
    assert len(fetcher.asked) == asked
    assert source.read_range("m", 12_345, 10) == fetcher.content[12_345:12_355]
    assert len(fetcher.asked) == asked + 1
    source.close()


def test_the_best_quarter_of_a_second():
    meter = RateMeter()
    assert meter.best() is None
    for slot in range(20):
        meter.add(100 if 8 <= slot < 13 else 10, now=meter._begun + (slot + 0.5) * SLOT_S)
    assert meter.best() == pytest.approx(500 / (5 * SLOT_S))


def test_a_short_load_does_not_claim_to_know_the_link():
    meter = RateMeter()
    for slot in range(9):
        meter.add(1000, now=meter._begun + (slot + 0.5) * SLOT_S)
    assert meter.best() is None


def test_what_a_start_prints():
    report = LoadReport("s3://b/m", 2_000_000_000, 4.0, link_bytes_per_s=1e9, link_given=True,
                        resumed=2, verified=False)  # fmt: skip
    first, second = report.lines()
    assert first == (
        "2.00 GB in 4.00 s, 0.500 GB/s, 50% of the narrowest link (1.000 GB/s as given), "
        "2 ranges resumed, from s3://b/m"
    )
    assert second.startswith("not verified: no manifest")
    assert report.attributes()["kvrelay.weights.link_share"] == pytest.approx(0.5)
    (local,) = LoadReport("/m", 1_000_000, 1.0, cached_bytes=500_000).lines()
    assert "50% of it from the page cache, link not known (--link-gbps)" in local


def test_without_a_manifest_no_request_is_larger_than_a_part():
    tensors, size = checkpoint()
    fetcher = Memory(size)
    source = stream(tensors, size, fetcher, streams=2, part_bytes=3 * KIB)
    source.need(list(tensors))
    for name in in_order(tensors):
        source.read(name)
    assert max(end - start for start, end in fetcher.asked) == 3 * KIB
    source.close()


def test_the_flags_repeat_the_defaults():
    from kvrelay.cli.stack import defaults
    from kvrelay.cli.weight_source import stream_options

    assert stream_options(defaults()) == StreamOptions()
    assert stream_options(defaults(link_gbps=8.0)).link_bytes_per_s == 1e9
    here = ModelFiles("m", Path("folder"))
    assert stream_options(defaults(), here).keep_in is None
    assert stream_options(defaults(share_weights="disk"), here).keep_in == Path("folder")
