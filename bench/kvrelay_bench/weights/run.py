"""Rounds of three clients at each store, interleaved, so that they share what the machine does else."""

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
from kvrelay_bench.weights.stores import BUCKET, PLAIN, VERIFIED, environment, running_stores
from kvrelay_protocol.model_files import MODEL_FILES
from kvrelay_protocol.weights.pin import PinnedModel, pin_model
from kvrelay_protocol.weights.s3 import connect
from kvrelay_protocol.weights.source import layer_order
from kvrelay_protocol.weights.stream import StreamOptions

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

TARGET = 0.8
OURS = "kvrelay"
_CHUNK = 1024 * 1024
_FILE = "model.safetensors"


def run_weights(values: SimpleNamespace) -> int:
    """Measure; 0 where our loader, without checksums, reaches `TARGET` at both stores."""
    found: dict[str, dict[str, list[float]]] = {}
    with running_stores(values.size) as stores, tempfile.TemporaryDirectory() as cache:
        for store, url in stores.items():
            with environment(url):
                found[store] = _measure(store, values, Path(cache))
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


def _measure(store: str, values: SimpleNamespace, cache: Path) -> dict[str, list[float]]:
    plain, verified = (
        pin_model(f"s3://{BUCKET}/{prefix}", None, MODEL_FILES, cache=cache)
        for prefix in (PLAIN, VERIFIED)
    )
    options = StreamOptions(streams=values.streams, part_bytes=values.part)
    clients: dict[str, Callable[[], float]] = {
        "plain GETs": lambda: plain_client(values.streams, values.part),
        OURS: lambda: loader(plain, options),
        "kvrelay, sha256": lambda: loader(verified, options),
    }
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(values.rounds + 1):
        for name, client in clients.items():
            rate = client()
            if number:
                rates[name].append(rate)
            print(f"{store:<9} {name:<16} {number}/{values.rounds}  {rate:.3f} GB/s", flush=True)
    return rates


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


def loader(model: PinnedModel, options: StreamOptions) -> float:
    """GB/s of our stream, its tensors taken in layer order and dropped."""
    # A client of its own, as the plain one has: connections are made anew in each round.
    client = _warm_client(options.streams)
    fresh = PinnedModel(model.location, model.revision, model.directory, model.objects, client)
    begun = time.perf_counter()
    source = fresh.stream(options)
    source.need(list(source.tensors))
    for name in sorted(source.tensors, key=layer_order):
        source.read(name)
    seconds = time.perf_counter() - begun
    source.close()
    client.close()
    return sum(tensor.nbytes for tensor in source.tensors.values()) / seconds / 1e9
