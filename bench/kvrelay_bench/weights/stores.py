"""The two local stores with the same random checkpoint in each, once with a manifest, once without."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from kvrelay_infra.host import free_port
from kvrelay_protocol.errors import WorkerStartFailed
from kvrelay_protocol.model_files import MODEL_FILES
from kvrelay_protocol.weights.manifest import MANIFEST, make_manifest
from kvrelay_protocol.weights.pin import push_model
from kvrelay_protocol.weights.s3 import connect

BUCKET = "bench"
VERIFIED, PLAIN = "verified", "plain"
"""Prefixes: with and without a manifest."""
_LAYERS = 16
_MIB = 1024 * 1024
_START_S = 60.0


def write_checkpoint(folder: Path, nbytes: int) -> None:
    """A safetensors file of `_LAYERS` layers with an embedding as large as one of them."""
    rows = max(nbytes // (_LAYERS + 1) // 2 // 1024, 1)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{n}.mlp.down_proj.weight" for n in range(_LAYERS)]
    size, header = rows * 1024 * 2, {}
    for index, name in enumerate(names):
        offsets = [index * size, (index + 1) * size]
        header[name] = {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": offsets}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        left = size * len(names)
        while left:
            left -= file.write(os.urandom(min(left, 8 * _MIB)))
    (folder / "config.json").write_text("{}")


@contextlib.contextmanager
def running_stores(nbytes: int) -> Iterator[tuple[dict[str, str], Path]]:
    """Endpoint URL of each store by its name, while both run; and the weight file they have."""
    with tempfile.TemporaryDirectory(prefix="kvrelay-weights-") as name:
        root = Path(name)
        with_manifest, without = root / BUCKET / VERIFIED, root / BUCKET / PLAIN
        with_manifest.mkdir(parents=True)
        without.mkdir()
        write_checkpoint(without, nbytes)
        names = sorted(path.name for path in without.iterdir())
        for each in names:
            (with_manifest / each).hardlink_to(without / each)
        (with_manifest / MANIFEST).write_text(make_manifest(without, names).to_json())
        with _range_server(root) as bare, _moto() as moto:
            _fill_moto(moto, without)
            yield {"sendfile": bare, "moto": moto}, without / "model.safetensors"


def _fill_moto(url: str, folder: Path) -> None:
    with environment(url):
        client = connect(4)
        client.create_bucket(Bucket=BUCKET)
        push_model(folder, f"s3://{BUCKET}/{VERIFIED}", MODEL_FILES)
        for path in folder.iterdir():
            client.upload_file(str(path), BUCKET, f"{PLAIN}/{path.name}")


@contextlib.contextmanager
def environment(url: str) -> Iterator[None]:
    """boto3 clients made in here talk to this store."""
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def _range_server(root: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "kvrelay_bench.weights.range_server", str(root)]
    with _process(command) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise WorkerStartFailed("the range server did not start")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _moto() -> Iterator[str]:
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _process(command) as process:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):  # noqa: S310 - ours
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise WorkerStartFailed(
                        "moto's server did not start: pip install 'moto[s3,server]'"
                    ) from None
                time.sleep(0.1)
        yield url
