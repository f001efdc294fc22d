"""Fresh processes, one at a time, each asked for one token of one prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from kvrelay_bench.compare.engines import Setting, prepare, wanted_engines
from kvrelay_bench.compare.peers import PeerUnavailable
from kvrelay_bench.compare.points import Point, draw_prompts
from kvrelay_bench.compare.processes import EngineProcess, EngineSpec, Start
from kvrelay_bench.machine import describe_machine
from kvrelay_bench.models import ModelShape, find_model, read_shape
from kvrelay_bench.report import Summary, Table, cache_dir, summarise, write_report
from kvrelay_infra.host import read_cores
from kvrelay_protocol.errors import WorkerStartFailed

_POINT = Point(1, 32, 1)
_START_TIMEOUT_S = 900.0
_CALL_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds of one process: its phases add up to `first_token_s`."""

    phases: Mapping[str, float]
    first_token_s: float
    versions: Mapping[str, str]


def run_startup(values: SimpleNamespace) -> int:
    """`kvrelay bench startup`; 0 when every engine that was asked for has started.

    Raises:
        KvrelayError: the model is unusable, or this engine does not start; one clear line.
    """
    model = find_model(values.model)
    shape = read_shape(model)
    setting = Setting(model, shape, values.threads or read_cores(), (_POINT,))
    found: dict[str, list[Startup]] = {}
    first: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, spec in _specs(values, setting, left_out).items():
        try:
            for number in range(values.rounds + 1):
                startup = start_once(spec, shape)
                if number == 0:
                    first[name] = startup.first_token_s
                else:
                    found.setdefault(name, []).append(startup)
                count = f"{number}/{values.rounds}" if number else "not counted"
                print(f"{name}  {count:<11} {startup.first_token_s:7.2f} s", flush=True)
        except WorkerStartFailed as error:
            if name.startswith("kvrelay"):
                raise
            left_out[name] = str(error)
            print(f"left out: {error}", flush=True)
    print(f"\n{table(found).text()}\n")
    rows = [{"engine": name, "first_start_s": first[name], **_row(starts)}
            for name, starts in found.items()]  # fmt: skip
    path = write_report("startup", values, rows, describe_machine(), values.out,
                        details={"left_out": left_out, "starts": found})  # fmt: skip
    print(f"written: {path}")
    return 1 if left_out else 0


def start_once(spec: EngineSpec, shape: ModelShape) -> Startup:
    """Start an engine, ask for a token, end it.

    Raises:
        WorkerStartFailed: it ended, or took too long.
    """
    process = EngineProcess(spec, cache_dir() / "logs" / f"startup-{spec.name}.log")
    try:
        start = process.wait_ready(_START_TIMEOUT_S)
        prompts = draw_prompts(_POINT, shape.vocab_size, seed=0)
        run = process.generate(prompts, _POINT.output_len, _CALL_TIMEOUT_S)
        first_token_s = process.since_start(run.ended_at)
    finally:
        process.close()
    return Startup(phases(start, first_token_s), first_token_s, start.versions)


def phases(start: Start, first_token_s: float) -> dict[str, float]:
    """The seconds of each phase; what an engine does not tell apart is `load`."""
    told = dict(start.phases)
    loading = start.ready_s - start.import_s
    return {
        "python": start.python_s,
        "import": start.import_s - start.python_s,
        **told,
        "other" if told else "load": loading - sum(told.values()),
        "first token": first_token_s - start.ready_s,
    }


def table(found: Mapping[str, Sequence[Startup]]) -> Table:
    """Medians of every phase, and of the whole with its spread."""
    names = list(dict.fromkeys(
        phase for starts in found.values() for start in starts for phase in start.phases
    ))  # fmt: skip
    names.sort(key=lambda name: name == "first token")
    rows = []
    for engine, starts in found.items():
        medians = _phase_medians(starts)
        whole = _whole(starts)
        rows.append((engine, *(medians.get(name) for name in names), whole.median,
                     f"{whole.minimum:.2f}..{whole.maximum:.2f}", whole.count))  # fmt: skip
    return Table(("engine", *names, "whole s", "spread", "n"), rows)


def _row(starts: Sequence[Startup]) -> dict[str, Any]:
    return {
        "first_token_s": _whole(starts),
        "phases_s": _phase_medians(starts),
        "versions": starts[0].versions,
    }


def _whole(starts: Sequence[Startup]) -> Summary:
    return summarise(start.first_token_s for start in starts)


def _phase_medians(starts: Sequence[Startup]) -> dict[str, float]:
    return {
        phase: summarise(start.phases[phase] for start in starts).median
        for phase in starts[0].phases
    }


def _specs(
    values: SimpleNamespace, setting: Setting, left_out: dict[str, str]
) -> dict[str, EngineSpec]:
    specs = {}
    flags = describe_machine().cpu_flags
    for name in wanted_engines(values.peers, int8=values.int8, cpu_flags=flags):
        try:
            specs[name] = prepare(name, setting, values.peers_dir, print)
        except PeerUnavailable as error:
            left_out[name] = str(error)
            print(f"left out: {error}", flush=True)
    return specs
