"""Rounds of every client at each store, interleaved, so that they share what the machine does else."""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvrelay_bench.machine import describe_machine
from kvrelay_bench.report import Table, software_versions, summarise, write_report
from kvrelay_bench.weights.peer import PeerServer
from kvrelay_bench.weights.stores import BUCKET, PLAIN, VERIFIED, environment, running_stores
from kvrelay_protocol.errors import TransferCancelled
from kvrelay_protocol.model_files import MODEL_FILES
from kvrelay_protocol.weights.manifest import MANIFEST, parse_manifest
from kvrelay_protocol.weights.peer import FindPeer
from kvrelay_protocol.weights.pin import PinnedModel, pin_model
from kvrelay_protocol.weights.s3 import connect
from kvrelay_protocol.weights.source import layer_order
from kvrelay_protocol.weights.stream import StreamOptions
from kvrelay_transfer.weights.client import UNHURRIED, PeerReader

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

TARGET = 0.8
OURS = "kvrelay"
PEER = "kvrelay, sha256, from a peer"
_CHUNK = 1024 * 1024
_FILE = "model.safetensors"


def run_weights(values: SimpleNamespace) -> int:
    """Measure; 0 where our loader, without checksums, reaches `TARGET` at both stores."""
    found: dict[str, dict[str, list[float]]] = {}
    with running_stores(values.size) as (stores, file), tempfile.TemporaryDirectory() as cache:
        for store, url in stores.items():
            with environment(url):
                found[store] = _measure(store, values, Path(cache), file)
    rows: list[dict[str, Any]] = [
        {
            "store": store,
            "client": client,
            "gb_per_s": summarise(rates),
            "share_of_plain": summarise(rates).median / summarise(clients["plain GETs"]).median,
        }
        for store, clients in found.items()
        for client, rates in clients.items()
    ]
    header = ("store", "client", "GB/s", "min..max", "share of plain")
    cells = [(row["store"], row["client"], row["gb_per_s"].median,
              f"{row['gb_per_s'].minimum:.2f}..{row['gb_per_s'].maximum:.2f}",
              row["share_of_plain"]) for row in rows]  # fmt: skip
    print(f"\n{Table(header, cells).text()}\n")
    path = write_report("weights", values, rows, describe_machine(),
                        Path(values.out) if values.out else None,
                        details={"target": TARGET, "cores": os.cpu_count()},
                        versions=software_versions("boto3", "moto"))  # fmt: skip
    print(f"written: {path}")
    return 0 if all(row["share_of_plain"] >= TARGET for row in rows if row["client"] == OURS) else 1


def _measure(
    store: str, values: SimpleNamespace, cache: Path, file: Path
) -> dict[str, list[float]]:
    plain, verified = (
        pin_model(f"s3://{BUCKET}/{prefix}", None, MODEL_FILES, cache=cache)
        for prefix in (PLAIN, VERIFIED)
    )
    options = StreamOptions(streams=values.streams, part_bytes=values.part)
    clients: dict[str, Callable[[], float]] = {
        "plain GETs": lambda: plain_client(values.streams, values.part),
        OURS: lambda: loader(plain, options),
        "kvrelay, sha256": lambda: loader(verified, options),
        PEER: lambda: from_peer(verified, options, peer),
    }
    rates: dict[str, list[float]] = {name: [] for name in clients}
    with PeerServer(file, _identity(verified)) as peer:
        for number in range(values.rounds + 1):
            for name, client in clients.items():
                rate = client()
                if number:
                    rates[name].append(rate)
                print(
                    f"{store:<9} {name:<28} {number}/{values.rounds}  {rate:.3f} GB/s", flush=True
                )
    return rates


def _identity(model: PinnedModel) -> str:
    path = model.directory / MANIFEST
    return parse_manifest(path.read_text(), str(path)).identity()


def _warm_client(streams: int) -> "S3Client":
    """A client whose first request, which loads half of botocore, is behind it."""
    client = connect(streams)
    client.head_object(Bucket=BUCKET, Key=f"{PLAIN}/{_FILE}")
    return client


def plain_client(streams: int, part: int) -> float:
    """GB/s of ranged GETs over boto3 by a pool of threads that drop what they read."""
    client = _warm_client(streams)
    key = f"{PLAIN}/{_FILE}"
    total = client.head_object(Bucket=BUCKET, Key=key)["ContentLength"]

    def get(start: int) -> None:
        span = f"bytes={start}-{min(start + part, total) - 1}"
        body = client.get_object(Bucket=BUCKET, Key=key, Range=span)["Body"]
        while body.read(_CHUNK):
            pass
        body.close()

    begun = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(get, range(0, total, part)))
    rate = total / (time.perf_counter() - begun) / 1e9
    client.close()
    return rate


def loader(model: PinnedModel, options: StreamOptions, find_peer: FindPeer | None = None) -> float:
    """GB/s of our stream, its tensors taken in layer order and dropped."""
    # A client of its own, as the plain one has: connections are made anew in each round.
    client = _warm_client(options.streams)
    fresh = PinnedModel(model.location, model.revision, model.directory, model.objects, client)
    begun = time.perf_counter()
    source = fresh.stream(options, find_peer)
    source.need(list(source.tensors))
    for name in sorted(source.tensors, key=layer_order):
        source.read(name)
    seconds = time.perf_counter() - begun
    share = source.report().peer
    source.close()
    client.close()
    if share is not None and share.nbytes != source.report().nbytes:
        raise TransferCancelled(f"the store had to help the peer: {share.note}")
    return sum(tensor.nbytes for tensor in source.tensors.values()) / seconds / 1e9


def from_peer(model: PinnedModel, options: StreamOptions, peer: PeerServer) -> float:
    """GB/s of the same stream with every byte from another process, over UCX."""
    # As warm as the others' client: the transport runs, the connection is made by the first request.
    reader = PeerReader("ucx", UNHURRIED)
    peer.offer(reader)
    return loader(model, options, lambda _: reader)
