"""The parent's end of an engine process: start it, ask it, put it to sleep, end it."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay_bench.machine import BusyCores
from kvrelay_protocol.errors import WorkerStartFailed

WORKERS = Path(__file__).parent / "workers"
_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How one engine is started and what it is compared as."""

    name: str
    module: str
    """A file in `workers/`."""
    python: Path
    options: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bfloat16"
    """Of the weights, a key of `work.WEIGHT_BYTES`."""


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the start of the process to the end of each phase, and what the engine is made of."""

    python_s: float
    import_s: float
    ready_s: float
    versions: Mapping[str, str]
    phases: Mapping[str, float]
    """Seconds of the parts of loading, where the engine tells them."""


@dataclass(frozen=True, slots=True)
class Run:
    """One timed call, measured inside the engine's process."""

    seconds: float
    cpu_seconds: float
    """Of all the engine's processes."""
    foreign_share: float
    """Share of the machine's cores that others had meanwhile, time stolen by its host included."""
    tokens: list[list[int]]
    ended_at: float
    """Of the machine's monotonic clock."""


class EngineProcess:
    """Owns one engine process and its process group.

    Between calls the group may be stopped by signal (`sleep`), so that no thread of an engine which
    is not being timed can spin, whatever its runtime does.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self.log = log
        self._begun = time.monotonic()
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [spec.python, "-P", WORKERS / "main.py", spec.module, json.dumps(spec.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **spec.environment},
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self, timeout_s: float) -> Start:
        """Wait until the model is loaded.

        Raises:
            WorkerStartFailed: the process ended, or took longer.
        """
        marks = {event: self._reply(event, timeout_s) for event in ("started", "imported", "ready")}
        since = {event: reply["at"] - self._begun for event, reply in marks.items()}
        return Start(
            python_s=since["started"],
            import_s=since["imported"],
            ready_s=since["ready"],
            versions=marks["ready"]["versions"],
            phases=marks["ready"]["phases"],
        )

    def tune(self, prompts: list[list[int]], output_len: int, timeout_s: float) -> dict[str, str]:
        """Let the engine try its variants on a small call, warm up, and say which it chose."""
        reply = self._ask("tuned", timeout_s, do="tune", prompts=prompts, output_len=output_len)
        notes: dict[str, str] = reply["notes"]
        return notes

    def generate(self, prompts: list[list[int]], output_len: int, timeout_s: float) -> Run:
        """Greedy tokens of the prompts, timed.

        Raises:
            WorkerStartFailed: the process ended, took longer, or gave other than `output_len`
                tokens for every prompt.
        """
        own, busy = _group_cpu_seconds(self._process.pid), BusyCores()
        reply = self._ask("generated", timeout_s, do="generate", prompts=prompts,
                          output_len=output_len)  # fmt: skip
        own = _group_cpu_seconds(self._process.pid) - own
        foreign = busy.foreign_share(own)
        if [len(row) for row in reply["tokens"]] != [output_len] * len(prompts):
            raise WorkerStartFailed(
                f"{self.spec.name} returned {[len(row) for row in reply['tokens']]} tokens, "
                f"{output_len} were asked of each of {len(prompts)} prompts"
            )
        return Run(reply["seconds"], own, foreign, reply["tokens"], reply["at"])

    def check(
        self, prompts: list[list[int]], output_len: int, top: int, timeout_s: float
    ) -> tuple[list[list[int]], list[dict[int, float]]]:
        """Greedy tokens, and the log-probabilities of the first token's most likely candidates."""
        reply = self._ask("checked", timeout_s, do="check", prompts=prompts,
                          output_len=output_len, top=top)  # fmt: skip
        logprobs = [{int(token): value for token, value in row.items()}
                    for row in reply["logprobs"]]  # fmt: skip
        return reply["tokens"], logprobs

    def since_start(self, at: float) -> float:
        """Seconds from the start of the process to a moment of the monotonic clock."""
        return at - self._begun

    def sleep(self) -> None:
        """Stop every thread of the engine until `wake`."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process and everything it started."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):
            stdin.close()
        self.wake()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put(None)

    def _ask(self, event: str, timeout_s: float, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        return self._reply(event, timeout_s)

    def _reply(self, event: str, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerStartFailed(
                f"{self.spec.name} gave no answer in {timeout_s:.0f} s; its log is {self.log}"
            ) from None
        if line is None:
            raise self._ended()
        reply: dict[str, Any] = json.loads(line)
        if reply["event"] != event:
            raise WorkerStartFailed(f"{self.spec.name} answered {reply['event']}, not {event}")
        return reply

    def _ended(self) -> WorkerStartFailed:
        status = self._process.wait()
        how = "was killed, perhaps for memory" if status == -signal.SIGKILL else "ended"
        return WorkerStartFailed(
            f"{self.spec.name} {how}: {last_line(self.log)} (status {status}, log: {self.log})"
        )


def _group_cpu_seconds(group: int) -> float:
    """User and system time of the living processes of a group (proc(5): stat fields 5, 14, 15)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said: Sequence[str] = [line for line in lines if line]
    # Our errors are one clear line; the name of their class adds nothing.
    return said[-1].removeprefix("kvrelay_protocol.errors.")[:300] if said else "it printed nothing"
