"""The supervisor with real child processes: a small fake router and fake workers."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_ports

from kvrelay_infra.console import Console
from kvrelay_infra.local import LocalFleet, LocalStack, describe_status
from kvrelay_infra.process import ChildSpec
from kvrelay_protocol.errors import WorkerStartFailed

HERE = Path(__file__).parent
WORKERS = ("prefill-0", "decode-0")


@pytest.fixture(params=["started", "forked"], autouse=True)
def forked(request, monkeypatch) -> bool:
    """Everything holds for workers that the fork server makes as well."""
    monkeypatch.setattr(Running, "preload", "" if request.param == "started" else "preloaded:load")
    return request.param == "forked"


class Running:
    """A supervisor process and what it has printed so far."""

    preload = ""
    """`module:function` for a fork server; empty for none."""

    def __init__(self, *, worker_mode="", decode=None, drain_s=0.0, drain_grace_s=60.0):
        http_port, join_port = free_ports(2)
        workers = {
            name: [sys.executable, "-m", "fake_worker", name, str(join_port), worker_mode]
            for name in WORKERS
        }
        if decode is not None:
            workers["decode-0"] = decode
        router = [sys.executable, str(HERE / "fake_router.py")]
        settings = {
            "router": [*router, str(http_port), str(join_port), str(drain_s)],
            "workers": workers,
            "http_port": http_port,
            "join_port": join_port,
            "drain_grace_s": drain_grace_s,
            "preload": self.preload,
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "run_supervisor.py"), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *_python_path()])},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str, *, count: int = 1, timeout_s: float = 60.0) -> re.Match[str]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            matches = [m for line in list(self.lines) if (m := re.search(pattern, line))]
            if len(matches) >= count:
                return matches[count - 1]
            time.sleep(0.02)
        pytest.fail(f"no {pattern!r} in:\n" + "\n".join(self.lines))

    def pid_of(self, name: str, *, incarnation: int = 1) -> int:
        return int(self.wait_for(rf"^\[{name}\] +pid (\d+)", count=incarnation)[1])

    def wait(self, timeout_s: float = 60.0) -> int:
        status = self.process.wait(timeout_s)
        self._reader.join(60)
        return status


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


@contextlib.contextmanager
def running(**options) -> Iterator[Running]:
    run = Running(**options)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
        run.wait()
    for line in run.lines:
        for pid in re.findall(r"^\[\S+\] +(?:pid|helper) (\d+)", line):
            assert_gone(int(pid))
        for segment in re.findall(r"^\[\S+\] +segment (\S+)", line):
            assert not Path(segment).exists()


def assert_gone(pid: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not is_alive(pid):
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_start_shows_phases_prefixes_output_and_stops_on_sigterm():
    with running() as run:
        run.wait_for("^serving$")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0
    text = "\n".join(run.lines)
    assert re.search(
        r"^  router +\d+\.\d\d s  workers join at 127\.0\.0\.1:\d+$", text, re.MULTILINE
    )
    assert re.search(r"^  workers +\d+\.\d\d s  prefill-0 decode-0 ready$", text, re.MULTILINE)
    assert "[router]    decode-0 joined" in run.lines


def test_the_router_drains_before_workers_are_told_to_stop():
    with running(drain_s=0.4) as run:
        run.wait_for("^serving$")
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 0
    drained = float(run.wait_for(r"\[router\] +router drained (\S+)")[1])
    assert float(run.wait_for(r"\[decode-0\] +terminated (\S+)")[1]) >= drained
    assert float(run.wait_for(r"\[prefill-0\] +terminated (\S+)")[1]) >= drained


def test_a_killed_worker_is_started_again():
    with running() as run:
        run.wait_for("^serving$")
        first = run.pid_of("decode-0")
        os.kill(first, signal.SIGKILL)
        run.wait_for("decode-0 ended: killed by SIGKILL")
        assert run.pid_of("decode-0", incarnation=2) != first
        run.wait_for(r"^\[router\] +decode-0 joined$", count=2)
        assert is_alive(run.pid_of("prefill-0"))
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0


def test_a_killed_router_is_started_again_on_the_same_port():
    with running() as run:
        run.wait_for("^serving$")
        workers = {run.pid_of("decode-0"), run.pid_of("prefill-0")}
        router = run.pid_of("router")
        os.kill(router, signal.SIGKILL)
        run.wait_for("router starts again")
        assert all(is_alive(pid) for pid in workers)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0


def test_a_second_interrupt_kills_children_that_do_not_listen():
    # Only the second interrupt can end it while the test waits.
    with running(worker_mode="stubborn", drain_s=600, drain_grace_s=600) as run:
        run.wait_for("^serving$")
        run.process.send_signal(signal.SIGINT)
        run.wait_for("draining")
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130


def test_a_second_interrupt_leaves_no_shared_memory_of_killed_children():
    with running(worker_mode="segment", drain_s=600, drain_grace_s=600) as run:
        run.wait_for("^serving$")
        segment = Path(run.wait_for(r"^\[decode-0\] +segment (\S+)")[1])
        assert segment.exists()
        run.process.send_signal(signal.SIGINT)
        run.wait_for("draining")
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130


def test_draining_longer_than_its_grace_kills():
    with running(drain_s=600, drain_grace_s=0.0) as run:
        run.wait_for("^serving$")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 130


def test_children_die_with_a_killed_parent():
    with running(worker_mode="stubborn") as run:
        run.wait_for("^serving$")
        pids = [run.pid_of("decode-0"), run.pid_of("prefill-0")]
        run.process.kill()
        for pid in pids:
            assert_gone(pid)


def test_children_have_process_groups_of_their_own():
    with running() as run:
        match = run.wait_for(r"^\[decode-0\] +pid (\d+) group (\d+) session (\d+)")
        assert match[1] == match[2] == match[3]
        run.wait_for("^serving$")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0


def test_what_a_worker_started_goes_with_it():
    with running(worker_mode="helper") as run:
        run.wait_for("^serving$")
        helper = int(run.wait_for(r"^\[decode-0\] +helper (\d+)")[1])
        os.kill(run.pid_of("decode-0"), signal.SIGKILL)
        assert_gone(helper)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0


def test_workers_are_forked_from_what_is_loaded_already(forked):
    with running() as run:
        run.wait_for("^serving$")
        loads = {run.wait_for(rf"^\[{name}\] +loaded by (\d+)")[1] for name in WORKERS}
        pids = {str(run.pid_of(name)) for name in WORKERS}
        assert len(loads) == (1 if forked else 2)
        assert loads.isdisjoint(pids) if forked else loads == pids
        for name in WORKERS:
            run.wait_for(rf"^\[{name}\] +parent {run.process.pid}$")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0


def test_without_its_fork_server_a_worker_starts_all_the_same(forked):
    if not forked:
        return
    with running() as run:
        run.wait_for("^serving$")
        server = int(run.wait_for(r"^\[decode-0\] +loaded by (\d+)")[1])
        os.kill(server, signal.SIGKILL)
        assert_gone(server)
        first = [run.pid_of("decode-0"), run.pid_of("prefill-0")]
        assert all(is_alive(pid) for pid in first)
        os.kill(first[0], signal.SIGKILL)
        second = run.pid_of("decode-0", incarnation=2)
        assert int(run.wait_for(r"^\[decode-0\] +loaded by (\d+)", count=2)[1]) == second
        os.kill(first[1], signal.SIGKILL)
        third = run.pid_of("prefill-0", incarnation=2)
        assert int(run.wait_for(r"^\[prefill-0\] +loaded by (\d+)", count=2)[1]) not in {
            server,
            third,
        }
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0


@pytest.mark.parametrize("preload", ["preloaded:fail", "preloaded:hang"])
def test_a_preload_that_fails_or_hangs_costs_nothing_but_time(forked, monkeypatch, preload):
    if not forked:
        return
    monkeypatch.setattr(Running, "preload", preload)
    with running() as run:
        if preload == "preloaded:fail":
            run.wait_for("^serving$")
        else:
            run.wait_for("workers join at")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0


def test_a_worker_that_can_not_start_fails_the_whole_start_and_shows_its_last_lines():
    broken = [sys.executable, "-c", "print('weights are damaged'); raise SystemExit(3)"]
    with running(decode=broken) as run:
        assert run.wait() == WorkerStartFailed.exit_code
    assert "decode-0 ended before it was ready: exit code 3; its last lines:" in run.lines
    assert "  [decode-0] weights are damaged" in run.lines


def fleet(*, worker: list[str] | None = None) -> LocalFleet:
    http_port, join_port = free_ports(2)
    command = worker or [str(HERE / "fake_worker.py"), "decode-0", str(join_port)]
    router = [sys.executable, str(HERE / "fake_router.py"), str(http_port), str(join_port)]
    return LocalFleet(
        router=ChildSpec("router", router),
        workers=[ChildSpec("decode-0", [sys.executable, *command])],
        http_host="127.0.0.1",
        http_port=http_port,
        join_host="127.0.0.1",
        join_port=join_port,
        drain_grace_s=1.0,
    )


def test_a_stack_serves_inside_its_block_and_is_gone_after_it(capsys):
    with LocalStack(fleet(), Console(relay=False)) as stack:
        pids = stack.pids()
        assert sorted(pids) == ["decode-0", "router"]
        assert all(is_alive(pid) for pid in pids.values())
    for pid in pids.values():
        assert_gone(pid)
    out = capsys.readouterr().out
    assert "[router]" not in out
    # Its owner leaves when nothing is open; how to interrupt a drain is for `up`.
    assert "draining" not in out


def test_a_stack_that_can_not_start_raises_and_leaves_nothing():
    with (
        pytest.raises(WorkerStartFailed, match="no such luck"),
        LocalStack(fleet(worker=["-c", "print('no such luck')"]), Console(relay=False)),
    ):
        pytest.fail("it must not be entered")


def test_a_secret_in_the_environment_is_not_on_the_command_line(capsys):
    show = "import os; print('saw', os.environ['KVRELAY_JOIN_TOKEN'])"
    base = fleet()
    spec = ChildSpec("decode-0", [sys.executable, "-c", show], {"KVRELAY_JOIN_TOKEN": "abc"})
    broken = LocalFleet(
        router=base.router,
        workers=[spec],
        http_host=base.http_host,
        http_port=base.http_port,
        join_host=base.join_host,
        join_port=base.join_port,
    )
    with pytest.raises(WorkerStartFailed, match="saw abc"), LocalStack(broken, Console()):
        pass
    assert "[decode-0] saw abc" in capsys.readouterr().out


def test_exit_statuses_in_words():
    assert describe_status(3) == "exit code 3"
    assert describe_status(-9) == "killed by SIGKILL"
