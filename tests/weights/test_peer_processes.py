"""Weights from another process over UCX, which is killed, stopped, or says no."""

import hashlib
import random
import signal
import threading
from pathlib import Path

import pytest
from memory_weights import HEAD, KIB, Memory, checkpoint, in_order

from kvrelay_bench.weights.peer import PeerServer
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import TransportMisconfigured, WeightsRefused
from kvrelay_protocol.weights.manifest import Manifest
from kvrelay_protocol.weights.peer import PeerFirst
from kvrelay_protocol.weights.stream import RemoteFiles, StreamedWeights, StreamOptions
from kvrelay_transfer.weights.client import UNHURRIED, Patience, PeerReader

MIB = 1024 * KIB


class Model:
    """A checkpoint of about 26 MiB, its manifest, and a store that has it."""

    def __init__(self, folder: Path) -> None:
        self.tensors, self.size = checkpoint(tensor_bytes=MIB - 3 * 64)
        self.store = Memory(self.size)
        self.store.content = random.Random(5).randbytes(self.size)
        pieces = {
            name: (hashlib.sha256(self.store.content[tensor.start : tensor.end]).hexdigest(),)
            for name, tensor in self.tensors.items()
        }
        self.manifest = Manifest(MIB, {}, {"m": pieces})
        self.identity = self.manifest.identity()
        self.path = folder / "m"
        self.path.write_bytes(self.store.content)

    def load(self, peer, *, on_read=lambda number: None, streams=4):
        """Every tensor, checked; returns the report."""
        head = self.store.content[:HEAD]
        files = RemoteFiles("s3://b/m", {"m": self.size}, {"m": head}, self.tensors, self.manifest)
        fetcher = PeerFirst(self.store, lambda _: peer, self.manifest)
        # A small window, so that reading sets the pace.
        options = StreamOptions(streams=streams, part_bytes=3 * MIB, window_bytes=4 * MIB)
        source = StreamedWeights(files, fetcher, options)
        source.need(list(self.tensors))
        for number, name in enumerate(in_order(self.tensors)):
            on_read(number)
            at = self.tensors[name]
            assert source.read(name) == self.store.content[at.start : at.end]
        report = source.report()
        source.close()
        assert report.nbytes == self.size - HEAD
        from_store = sum(end - start for start, end in self.store.asked)
        assert report.peer.nbytes + from_store == report.nbytes
        return report


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared_peer(model):
    """For the tests that leave it alive: starting one is most of what they take."""
    with PeerServer(model.path, model.identity) as peer:
        yield peer
    assert peer.process.returncode == 0


@pytest.fixture(autouse=True)
def fresh(model):
    model.store.asked.clear()


def reader_of():
    return PeerReader("ucx", UNHURRIED, message_bytes=256 * KIB)


def test_every_byte_comes_from_the_peer(model, shared_peer):
    reader = reader_of()
    shared_peer.offer(reader)
    report = model.load(reader)
    assert model.store.asked == []
    assert report.peer.worker.startswith("peer over tcp/")
    assert report.resumed == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ticket": bytes(32)}, "worker peer refuses: wrong_ticket"),
        ({"identity": "other"}, "worker peer refuses: other_weights"),
    ],
)
def test_a_refused_reader_takes_the_store(model, shared_peer, changes, reason):
    reader = reader_of()
    shared_peer.offer(reader, **changes)
    report = model.load(reader)
    assert report.peer.nbytes == 0
    assert report.lines()[0].endswith(f"from s3://b/m ({reason})")


@pytest.mark.parametrize("seed", range(2))
def test_a_peer_that_is_killed_costs_no_byte(model, seed):
    peer = PeerServer(model.path, model.identity)
    reader = reader_of()
    peer.offer(reader)
    moment = random.Random(seed).randrange(2, 16)

    def kill(number: int) -> None:
        if number == moment:
            peer.process.kill()

    report = model.load(reader, on_read=kill)
    peer.process.communicate()
    assert 0 < report.peer.nbytes < report.nbytes
    assert report.peer.note


def test_a_peer_that_stands_still_is_given_up(model, shared_peer):
    reader = PeerReader("ucx://?cancel_grace_s=0.3", UNHURRIED)
    shared_peer.offer(reader)

    def stop(number: int) -> None:
        if number == 5:
            shared_peer.process.send_signal(signal.SIGSTOP)
            reader._patience = Patience(window_s=0.2, least_bytes=1)

    report = model.load(reader, on_read=stop)
    shared_peer.process.send_signal(signal.SIGCONT)
    assert 0 < report.peer.nbytes < report.nbytes
    assert "it sent 0 bytes in" in report.lines()[0]


def test_a_found_peer_needs_a_ticket():
    reader = reader_of()
    with pytest.raises(WeightsRefused, match="a ticket of 0 bytes"):
        reader.read_from(pb.WeightsFound(worker_name="decode-0"), "id")
    reader.close()
    reader.close()
    assert reader.fetch("m", 0, memoryview(bytearray(4)), lambda _: None) == 0


def test_a_transport_that_does_not_start_leaves_no_thread():
    before = threading.active_count()
    with pytest.raises(TransportMisconfigured, match="no option 'colour'"):
        PeerReader("ucx://?colour=red")
    assert threading.active_count() == before
