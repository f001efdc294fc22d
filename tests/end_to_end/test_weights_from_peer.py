"""A second worker takes its weights from the first: the store is not asked for them again."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from ports import free_ports
from s3_store import model_cache, running_store

from kvrelay.cli.main import main
from kvrelay_protocol.model_files import DEMO_MODEL_DIR

MODEL = "s3://models/demo"
BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": "What does os.path.join do?"}],
    "max_tokens": 24,
    "temperature": 0,
}


class Process:
    """One `kvrelay` command."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvrelay.cli", *arguments],
                stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def wait_for(self, text: str) -> str:
        """What it has printed, once that contains `text`."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._process.poll() is None:
            if text in (printed := self.log.read_text()):
                return printed
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


class WeightRequests(logging.Handler):
    """Counts the store's answers with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self.count += "GET " in line and "/model.safetensors" in line


@contextlib.contextmanager
def counted_requests() -> Iterator[WeightRequests]:
    counter, log = WeightRequests(), logging.getLogger("werkzeug")
    log.addHandler(counter)
    yield counter
    log.removeHandler(counter)


def ask(port: int) -> str:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    answer = httpx.post(url, json=BODY, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_second_worker_reads_its_weights_from_the_first(tmp_path, monkeypatch):
    port, join_port = free_ports(2)
    named = ("--served-model-name", "m")
    worker = (MODEL, *named, "--join", f"127.0.0.1:{join_port}", "--join-token", "t",
              "--device", "cpu", "--threads", "1", "--kv-memory", "16MiB",
              # However slow this machine is; and nothing is rounded, on whatever CPU.
              "--weights-from", "peer", "--dtype", "float32")  # fmt: skip
    with running_store() as store, counted_requests() as requests, contextlib.ExitStack() as stack:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", model_cache(tmp_path / "cache"))
        assert main(["weights", "push", str(DEMO_MODEL_DIR), MODEL]) == 0

        def start(name: str, *arguments: str) -> Process:
            process = Process(tmp_path / f"{name}.log", *arguments)
            stack.callback(process.stop)
            return process

        router = start("router", "router", MODEL, *named, "--port", str(port),
                       "--join-port", str(join_port), "--join-token", "t")  # fmt: skip
        router.wait_for("workers join at")
        first = start("first", "decode", *worker, "--name", "first")
        assert "from s3://models/demo (no other worker has them)" in first.wait_for("joined ")
        expected = ask(port)
        fetched = requests.count
        assert fetched > 0
        log = start("second", "decode", *worker, "--name", "second").wait_for("joined ")
        assert "from peer first over tcp/" in log, log
        assert ", not s3://models/demo" in log
        assert requests.count == fetched
        first.stop()
        assert ask(port) == expected
