"""A prefill worker behind a network of its own: slow, cut, gone and back; real processes, real UCX."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from netns import Cable, Namespace, namespace
from ports import free_ports
from server_process import Server
from tiny_models import reference_chat, tiny_model

from kvrelay import Client, KvrelayClientError

# Its cables are devices that UCX in any other process would see come and go.
pytestmark = pytest.mark.alone

MODEL = "tiny"
NEW_TOKENS = 20
WORDS = 300
CRAWL_KBIT_S = 100
"""At which the KV of one such prompt takes a minute."""
MOVING = 64 * 1024
"""Bytes of KV that are here: far from all, and more than a greeting."""


@dataclass
class Net:
    """Router and decode worker here, the prefill worker there: one cable for gRPC, one for UCX."""

    far: Namespace
    control: Cable
    kv: Cable
    log: Path
    """Of all processes."""
    join_port: int
    server: Server = field(init=False)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self, name: str, *flags: str, device: str = "") -> subprocess.Popen[bytes]:
        """Run a router or, by its name, a worker on the cable's device."""
        role = name.partition("-")[0]
        command = [sys.executable, "-m", "kvrelay.cli", role, str(tiny_model("llama3")), *flags]
        command += ["--served-model-name", MODEL, "--lease", "3", "--heartbeat", "0.2"]
        if role != "router":
            command += ["--join", f"{self.control.address_here}:{self.join_port}", "--name", name]
            command += ["--kv-memory", "16MiB", "--dtype", "float32", "--threads", "1"]
        if role == "prefill":
            command[:0] = self.far.enter
        environment = os.environ | {"OMP_NUM_THREADS": "1", "KVRELAY_LOG_LEVEL": "INFO"}
        with self.log.open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | ({"UCX_NET_DEVICES": device} if device else {}),
            )
        return self.processes[name]

    def start_prefill(self) -> subprocess.Popen[bytes]:
        return self.start("prefill-0", device=self.kv.there)

    def ask(self) -> "Asked":
        """Ask a question of its own, whose KV nobody has, in a thread."""
        text = f"{next(self._numbers)} " + "the other one " * (WORDS // 3)
        return Asked(self.server.url, text)

    def until_moving(self, received: int) -> None:
        """KV is under way: some has come, and the transfer is not over."""
        self.server.wait(lambda: self.kv.received() > received + MOVING and self.open_transfers())

    def open_transfers(self) -> float:
        metrics = httpx.get(f"{self.server.url}/metrics").text
        found = re.search(r'kvrelay_kv_open_transfers\{worker="decode-0"\} (\S+)', metrics)
        return float(found[1]) if found else 0.0

    def check_whole(self) -> None:
        """Everybody is here, nothing is held, and KV passes."""
        self.server.wait_for_workers("prefill-0", "decode-0")
        self.server.wait_idle()
        # A worker may need a moment to find that its peer can be reached again.
        self.server.wait(self._is_disaggregated)
        self.server.wait_idle()

    def _is_disaggregated(self) -> bool:
        asked = self.ask()
        asked.check()
        assert asked.path == "local" or asked.kv_bytes > MOVING
        return asked.path == "disaggregated"


class Asked:
    """One request under way."""

    def __init__(self, url: str, text: str) -> None:
        self.text, self.answer, self.path, self.kv_bytes = text, "", "", 0
        self.error: KvrelayClientError | None = None
        self._thread = threading.Thread(target=self._work, args=(url,))
        self._thread.start()

    def _work(self, url: str) -> None:
        with Client(base_url=url) as client:
            try:
                options = {"max_tokens": NEW_TOKENS, "temperature": 0}
                reply = client.chat(self.text, **options, extra={"ignore_eos": True})
                self.answer, self.path = reply.text, reply.timings.path
                self.kv_bytes = reply.timings.kv_bytes
            except KvrelayClientError as error:
                self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def check(self) -> None:
        """It ends, in the right answer."""
        self._thread.join(120)
        assert not self.running, "it hangs"
        assert self.error is None
        assert self.answer == reference_chat(tiny_model("llama3"), self.text, NEW_TOKENS)[1]


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with namespace() as far, tempfile.NamedTemporaryFile(prefix="kvrelay-net-") as log:
        port, join_port = free_ports(2)
        made = Net(far, far.cable(), far.cable(), Path(log.name), join_port)
        try:
            router = made.start(
                "router", "--port", str(port), "--join-port", str(join_port),
                "--join-host", made.control.address_here,
            )  # fmt: skip
            made.server = Server(router, port, made.log)
            made.start("decode-0", device=made.kv.here)
            made.start_prefill()
            made.server.wait_for_workers("prefill-0", "decode-0")
            yield made
            made.check_whole()
        finally:
            for process in made.processes.values():
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


@pytest.fixture
def crawling(net: Net) -> Iterator[Net]:
    """KV moves so slowly that whatever is done to a transfer is done in its middle."""
    net.check_whole()
    try:
        net.kv.slow(CRAWL_KBIT_S)
    except OSError as error:
        pytest.skip(f"no token bucket here: {error}")
    yield net
    with contextlib.suppress(OSError):
        net.kv.full_speed()


def _in_the_middle(net: Net) -> Asked:
    received = net.kv.received()
    asked = net.ask()
    net.until_moving(received)
    assert asked.running
    return asked


def test_a_slow_link_delays_the_answer_and_changes_nothing(crawling: Net):
    crawling.kv.slow(8000)
    crawling.check_whole()


def test_a_stopped_prefill_worker_costs_no_answer_and_is_welcome_again(crawling: Net):
    asked = _in_the_middle(crawling)
    prefill = crawling.processes["prefill-0"]
    prefill.send_signal(signal.SIGSTOP)
    asked.check()
    assert asked.path == "local"
    crawling.server.wait_idle()
    crawling.kv.full_speed()
    prefill.send_signal(signal.SIGCONT)
    crawling.check_whole()


@pytest.mark.parametrize("both", [True, False], ids=["both cables", "UCX alone"])
def test_a_cut_in_the_middle_of_a_transfer(crawling: Net, both):
    asked = _in_the_middle(crawling)
    cables = [crawling.kv, crawling.control] if both else [crawling.kv]
    for cable in cables:
        cable.cut()
    asked.check()
    meanwhile = crawling.ask()
    meanwhile.check()
    for cable in cables:
        cable.mend()
    crawling.kv.full_speed()
    crawling.check_whole()


@pytest.mark.parametrize("restart", ["kill", "drain"])
def test_a_prefill_worker_that_starts_again_under_its_address(crawling: Net, restart):
    asked = _in_the_middle(crawling)
    prefill = crawling.processes["prefill-0"]
    if restart == "kill":
        prefill.kill()
    else:
        crawling.kv.full_speed()
        prefill.terminate()
    assert prefill.wait(120) in (0, -signal.SIGKILL)
    asked.check()
    crawling.start_prefill()
    with contextlib.suppress(OSError):
        crawling.kv.full_speed()
    crawling.check_whole()
