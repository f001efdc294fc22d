"""Weights that two sides have: what a peer gives is its, the rest is the store's, and every byte is right."""

import hashlib
import threading

import pytest
import torch
from memory_weights import HEAD, KIB, Memory, checkpoint, in_order
from tiny_checkpoints import tiny_checkpoint

from kvrelay_engine.models.resident import ResidentWeights
from kvrelay_engine.models.weights import load_model_config, load_weights
from kvrelay_protocol.errors import InvalidModel, TransportMisconfigured
from kvrelay_protocol.model_files import DEMO_MODEL_DIR
from kvrelay_protocol.weights.kept import KeptFiles
from kvrelay_protocol.weights.local import LocalWeights
from kvrelay_protocol.weights.manifest import Manifest
from kvrelay_protocol.weights.peer import PeerFirst
from kvrelay_protocol.weights.stream import RemoteFiles, StreamedWeights, StreamOptions

CPU = torch.device("cpu")
PIECE = 2 * KIB


class Peer:
    """Gives `limit` bytes in all, then is gone."""

    worker = "decode-0 over memory"

    def __init__(self, content, limit=1 << 60, gives=lambda content: content):
        self.content, self.left, self.gives = content, limit, gives
        self.gone, self.closed, self.asked = "", False, 0
        self._lock = threading.Lock()

    def fetch(self, file, start, into, received):
        with self._lock:
            self.asked += 1
            count = min(len(into), self.left)
            self.left -= count
        into[:count] = self.gives(self.content[start : start + count])
        received(count)
        if count < len(into):
            self.give_up("it went away")
        return count

    def give_up(self, why):
        self.gone = self.gone or why

    def close(self):
        self.closed = True


def manifest_of(tensors, content):
    """As a push would write it, for the one file `m`."""

    def pieces(tensor):
        starts = range(tensor.start, tensor.end, PIECE)
        parts = (content[at : min(at + PIECE, tensor.end)] for at in starts)
        return tuple(hashlib.sha256(part).hexdigest() for part in parts)

    return Manifest(PIECE, {}, {"m": {name: pieces(tensor) for name, tensor in tensors.items()}})


def loaded(peer_of, *, manifest=True, streams=3, keep_in=None):
    """Every tensor by name, the report, the store and the peer."""
    tensors, size = checkpoint()
    store = Memory(size)
    checks = manifest_of(tensors, store.content) if manifest else None
    peer = peer_of(store.content)

    def find(identity):
        assert identity == checks.identity()
        return peer

    files = RemoteFiles("s3://b/m", {"m": size}, {"m": store.content[:HEAD]}, tensors, checks)
    options = StreamOptions(streams=streams, part_bytes=4 * KIB, keep_in=keep_in)
    source = StreamedWeights(files, PeerFirst(store, find, checks), options)
    source.need(list(tensors))
    found = {name: bytes(source.read(name)) for name in in_order(tensors)}
    expected = {name: store.content[t.start : t.end] for name, t in tensors.items()}
    assert found == expected
    report = source.report()
    assert report.nbytes == size - HEAD
    source.close()
    return source, report, store, peer


def test_all_of_it_comes_from_a_peer_that_has_it():
    _, report, store, peer = loaded(Peer)
    assert store.asked == []
    assert report.peer.nbytes == report.nbytes
    assert "from peer decode-0 over memory (found in 0.00 s), not s3://b/m" in report.lines()[0]
    assert report.attributes()["kvrelay.weights.peer_bytes"] == report.nbytes
    assert report.verified
    assert peer.closed


@pytest.mark.parametrize("limit", [0, 1, 4 * KIB, 33_333])
def test_the_store_goes_on_at_the_byte_where_a_peer_stopped(limit):
    _, report, store, _ = loaded(lambda content: Peer(content, limit), streams=1)
    assert report.peer.nbytes == limit
    assert sum(end - start for start, end in store.asked) == report.nbytes - limit
    assert report.resumed == (1 if limit % (4 * KIB) else 0)
    assert "(it went away)" in report.lines()[0]


@pytest.mark.parametrize("streams", [1, 6])
def test_a_wrong_piece_of_a_peer_is_fetched_from_the_store(streams):
    def damaged(content):
        return bytes([content[0] ^ 1]) + content[1:] if content else content

    _, report, store, _ = loaded(lambda c: Peer(c, gives=damaged), streams=streams)
    assert report.peer.nbytes == 0
    assert sum(end - start for start, end in store.asked) == report.nbytes
    assert "it sent a wrong checksum" in report.lines()[0]


def test_a_wrong_piece_of_the_store_still_ends_the_start():
    tensors, size = checkpoint()
    store = Memory(size)
    checks = manifest_of(tensors, bytes(size))
    files = RemoteFiles("s3://b/m", {"m": size}, {"m": b""}, tensors, checks)
    source = StreamedWeights(files, PeerFirst(store, lambda _: Peer(store.content), checks))
    with pytest.raises(InvalidModel, match="wrong checksum"):
        source.read("model.embed_tokens.weight")
    source.close()


def test_nothing_is_taken_from_a_peer_without_a_manifest():
    _, report, store, peer = loaded(Peer, manifest=False)
    assert peer.asked == 0
    assert store.asked
    assert "without a manifest nothing is taken from another worker" in report.lines()[0]


def test_a_search_that_fails_is_a_note_and_the_store_has_everything():
    def fails(identity):
        raise TransportMisconfigured("no such device")

    tensors, size = checkpoint()
    store = Memory(size)
    checks = manifest_of(tensors, store.content)
    files = RemoteFiles("s3://b/m", {"m": size}, {"m": b""}, tensors, checks)
    source = StreamedWeights(files, PeerFirst(store, fails, checks))
    source.need(list(tensors))
    for name in in_order(tensors):
        source.read(name)
    assert source.report().lines()[0].endswith("from s3://b/m (no such device)")
    source.close()


def test_nobody_has_them():
    _, report, _, _ = loaded(lambda content: None)
    assert report.lines()[0].endswith("from s3://b/m (no other worker is known to have them)")


def test_an_identity_is_that_of_the_bytes():
    tensors, size = checkpoint()
    content = Memory(size).content
    one = manifest_of(tensors, content)
    assert one.identity() == manifest_of(tensors, content).identity()
    assert one.identity() != manifest_of(tensors, bytes([1]) * size).identity()


# ---- what a worker can give


def test_what_was_kept_on_disk_is_what_came(tmp_path):
    source, report, store, _ = loaded(Peer, keep_in=tmp_path)
    kept = source.kept
    assert kept.identity == source.identity
    assert list(tmp_path.iterdir()) == []  # the file has no name
    into = bytearray(5000)
    assert kept.has("m", HEAD, HEAD + report.nbytes)
    assert not kept.has("m", HEAD - 1, HEAD + 10)
    assert not kept.has("other", HEAD, HEAD + 10)
    kept.read("m", 20_001, memoryview(into))
    assert into == store.content[20_001:25_001]
    kept.close()
    assert not kept.has("m", HEAD, HEAD + 10)


def test_a_full_disk_ends_the_keeping_and_not_the_start(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    kept = KeptFiles(blocked, {"m": 10}, "id")
    assert (kept.identity, kept.has("m", 0, 1)) == ("", False)
    kept.keep("m", 0, memoryview(b"abc"))
    assert kept.failed


def resident(family, dtype, quantization=None):
    folder = DEMO_MODEL_DIR if family == "demo" else tiny_checkpoint(family)
    config = load_model_config(folder)
    source = LocalWeights(folder)
    weights = load_weights(
        folder, config, device=CPU, dtype=dtype, quantization=quantization, source=source
    )
    return ResidentWeights(lambda: weights, config, source), source


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "demo"])  # the last in bfloat16
def test_a_loaded_model_gives_back_the_bytes_of_its_files(family, native, monkeypatch):
    if not native:
        # As on a GPU: no tiles, projections as rows.
        monkeypatch.setattr("kvrelay_kernels.linear.cpu_library", lambda: None)
    weights, source = resident(family, torch.float32)
    assert not weights.rounded
    for file, size in source.files.items():
        tensors = sorted((t.start, t.end) for t in source.tensors.values() if t.file == file)
        begin, content = tensors[0][0], source.read_range(file, 0, size)
        assert weights.has(file, begin, size)
        assert not weights.has(file, begin - 1, size)
        assert not weights.has(file, begin, size + 1)
        ranges = [
            (begin, size),
            *((a + 3, min(b + 5, size)) for a, b in tensors[:9]),
            (size - 1, size),
        ]
        for start, end in ranges:
            into = bytearray(end - start)
            weights.read(file, start, memoryview(into))
            assert into == content[start:end]


@pytest.mark.parametrize(
    ("dtype", "quantization"), [(torch.float32, "int8"), (torch.float16, None)]
)
def test_a_rounded_model_gives_nothing(dtype, quantization):
    weights, source = resident("llama2", dtype, quantization)
    assert weights.rounded
    assert weights.identity == ""
    (file,) = source.files
    assert not weights.has(file, source.tensors["model.norm.weight"].start, source.files[file])
