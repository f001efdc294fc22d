"""The comparison itself: prepare, start, check, measure in rounds, report after every round."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from kvrelay.cli.units import format_size
from kvrelay_bench.compare.agreement import TOP, Answer, compare_answers
from kvrelay_bench.compare.engines import (
    OURS_NAMES,
    Setting,
    memory_needed,
    prepare,
    transformers_spec,
    wanted_engines,
)
from kvrelay_bench.compare.findings import Findings
from kvrelay_bench.compare.peers import PeerUnavailable, ensure_peer
from kvrelay_bench.compare.points import CHECK_POINT, TUNE_POINT, Point, draw_prompts
from kvrelay_bench.compare.processes import EngineProcess, EngineSpec, Run
from kvrelay_bench.compare.result import Measurement
from kvrelay_bench.compare.schedule import Pair, contenders, fit, interleave
from kvrelay_bench.machine import describe_machine, probe_limits
from kvrelay_bench.models import find_model, read_shape
from kvrelay_bench.report import cache_dir
from kvrelay_infra.host import read_cores, read_memory
from kvrelay_protocol.errors import NotEnoughMemory, UsageError, WorkerStartFailed

START_TIMEOUT_S = 900.0
CALL_TIMEOUT_S = 1800.0
_FOREIGN_LIMIT = 0.05


def run_compare(values: SimpleNamespace) -> int:
    """`kvrelay bench compare`; 0 when every engine that was asked for has been measured.

    Raises:
        KvrelayError: nothing can be compared; one clear line.
    """
    model = find_model(values.model)
    shape = read_shape(model)
    setting = Setting(model, shape, values.threads or read_cores(), values.points)
    session = Session(values, setting, Findings(shape))
    try:
        session.prepare()
        session.start()
        session.measure()
        session.probe()
    finally:
        session.close()
        if session.findings.measured:
            print(f"\n{session.findings.text()}\n")
            say(f"written: {session.write()}")
    for name in session.findings.unsound:
        say(f"{name} does not compute the same model: {session.findings.agreements[name]}")
    return 1 if session.findings.left_out or session.findings.unsound else 0


def say(line: str) -> None:
    """Progress, at once even into a pipe."""
    print(line, flush=True)


@dataclass(slots=True)
class Session:
    """Owns the engine processes of one comparison."""

    values: SimpleNamespace
    setting: Setting
    findings: Findings
    engines: dict[str, EngineProcess] = field(default_factory=dict)
    """Those that run; all asleep but the one that is being asked."""

    def prepare(self) -> None:
        """Limits, environments, converted weights, and whether it all fits into memory.

        Raises:
            UsageError: a point is longer than the model allows.
            NotEnoughMemory: the engines do not fit side by side.
        """
        longest, positions = self.setting.longest, self.findings.shape.max_positions
        if longest > positions:
            raise UsageError(
                f"--points: {longest} tokens of prompt and answer exceed the model's {positions}"
            )
        flags = describe_machine().cpu_flags
        for name in wanted_engines(self.values.peers, int8=self.values.int8, cpu_flags=flags):
            try:
                spec = prepare(name, self.setting, self.values.peers_dir, say)
            except PeerUnavailable as error:
                self._leave_out(name, str(error))
            else:
                self.findings.specs[name] = spec
        self._check_memory()
        self.probe()

    def start(self) -> None:
        """Start one engine after the other, check and warm it up, put it to sleep."""
        reference = None if self.values.skip_check else self._reference()
        for name, spec in list(self.findings.specs.items()):
            self.engines[name] = EngineProcess(spec, _log(spec))
            try:
                self._start_one(name, reference)
            except WorkerStartFailed as error:
                self._drop(name, error)

    def measure(self) -> None:
        """Rounds, until there are enough or the time is up."""
        deadline = time.monotonic() + self.values.max_time
        last: dict[Pair, float] = {}
        for number in range(1, self.values.rounds + 1):
            pairs = interleave(self.setting.points, list(self.engines))
            if number > 1:
                kept = fit(pairs, last, contenders(last, ours=OURS_NAMES),
                           deadline - time.monotonic())  # fmt: skip
                if len(kept) < len(pairs):
                    say(f"round {number}: --max-time leaves {len(kept)} of {len(pairs)} calls")
                pairs = kept
            for point, name in pairs:
                if name in self.engines:  # it may have failed earlier in this round
                    self._call(point, name, number, last)
            if not pairs:
                break
            self.write()

    def probe(self) -> None:
        """Measure the machine's limits once more."""
        limits = probe_limits(self.setting.threads)
        self.findings.probes.append(limits)
        say(f"machine: {limits}")

    def write(self) -> Path:
        """Write what is known so far; always to the same file."""
        if self.values.out is None:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            self.values.out = cache_dir() / "results" / f"compare-{stamp}.json"
        return self.findings.write(self.values, self.values.out)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def _check_memory(self) -> None:
        specs = list(self.findings.specs.values())
        needed, available = memory_needed(specs, self.setting), read_memory().available
        if needed > available:
            raise NotEnoughMemory(
                f"{len(specs)} engines side by side take about {format_size(needed)} and "
                f"{format_size(available)} of memory are available; name fewer --peers or a "
                "smaller --model"
            )

    def _reference(self) -> Answer | None:
        """What transformers computes in float32, in a process that ends before any timing."""
        try:
            python = ensure_peer("transformers", self.values.peers_dir, say)
        except PeerUnavailable as error:
            self._leave_out("float32 reference", str(error))
            return None
        say("computing the float32 reference")
        spec = transformers_spec("float32 reference", self.setting, python, "float32")
        process = EngineProcess(spec, _log(spec))
        try:
            process.wait_ready(START_TIMEOUT_S)
            return self._answer(process)
        finally:
            process.close()

    def _start_one(self, name: str, reference: Answer | None) -> None:
        process, vocab_size = self.engines[name], self.findings.shape.vocab_size
        start = process.wait_ready(START_TIMEOUT_S)
        self.findings.starts[name] = start
        prompts = draw_prompts(TUNE_POINT, vocab_size, seed=0)
        notes = process.tune(prompts, TUNE_POINT.output_len, CALL_TIMEOUT_S)
        self.findings.notes[name] = notes
        chosen = "".join(f", {key} {value}" for key, value in notes.items() if key != "system")
        say(f"{name}: ready after {start.ready_s:.1f} s{chosen}")
        if reference:
            agreement = compare_answers(self._answer(process), reference)
            self.findings.agreements[name] = agreement
            say(f"{name}: beside float32, {agreement}")
        # Short prompts bring up buffers, kernels and threads at little cost.
        for batch in dict.fromkeys(point.batch for point in self.setting.points):
            short = draw_prompts(Point(batch, 16, 3), vocab_size, seed=0)
            process.generate(short, 3, CALL_TIMEOUT_S)
        process.sleep()

    def _answer(self, process: EngineProcess) -> Answer:
        prompts = draw_prompts(CHECK_POINT, self.findings.shape.vocab_size, seed=1)
        return process.check(prompts, CHECK_POINT.output_len, TOP, CALL_TIMEOUT_S)

    def _call(self, point: Point, name: str, number: int, last: dict[Pair, float]) -> None:
        prompts = draw_prompts(point, self.findings.shape.vocab_size, seed=number)
        try:
            with _awake(self.engines[name]) as process:
                run = process.generate(prompts, point.output_len, CALL_TIMEOUT_S)
        except WorkerStartFailed as error:
            self._drop(name, error)
            return
        last[point, name] = run.seconds
        self.findings.measured.append(Measurement.of(point, name, number, run))
        place = f"round {number}/{self.values.rounds}  {point!s:<10} {name:<21}"
        say(f"{place} {_progress(point, run)}")

    def _drop(self, name: str, error: WorkerStartFailed) -> None:
        """Go on without a peer; without our own engine there is nothing to compare."""
        self.engines.pop(name).close()
        if name in OURS_NAMES:
            raise error
        self._leave_out(name, str(error))

    def _leave_out(self, name: str, reason: str) -> None:
        self.findings.left_out[name] = reason
        say(f"left out: {reason}")


@contextmanager
def _awake(process: EngineProcess) -> Iterator[EngineProcess]:
    process.wake()
    try:
        yield process
    finally:
        process.sleep()


def _progress(point: Point, run: Run) -> str:
    tokens = point.tokens if point.is_prefill else point.generated
    text = f"{run.seconds:8.2f} s {tokens / run.seconds:8.1f} tokens/s"
    if run.foreign_share > _FOREIGN_LIMIT:
        text += f"  (others had {run.foreign_share:.0%} of the cores)"
    return text


def _log(spec: EngineSpec) -> Path:
    return cache_dir() / "logs" / f"{spec.name.replace(' ', '-')}.log"
