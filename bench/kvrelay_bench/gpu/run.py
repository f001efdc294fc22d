"""One run: ceilings, then each part until the budget is spent; a table last, a JSON file behind it."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

from kvrelay_bench.gpu.command import SECTIONS
from kvrelay_bench.gpu.work import HEADER, Job, Row, full_plan, smoke_plan
from kvrelay_bench.machine import describe_machine
from kvrelay_bench.report import Table, write_report
from kvrelay_protocol.errors import UsageError

_RESULTS = Path(__file__).parents[3] / "docs" / "results"


def run_gpu(values: SimpleNamespace) -> int:
    """`kvrelay bench gpu`; 1 if a result was wrong or a part failed.

    Raises:
        UsageError: no GPU, and not a smoke run.
    """
    import torch

    from kvrelay_bench.gpu.ceilings import measure_ceilings
    from kvrelay_bench.gpu.timing import Stopwatch

    device = _device(values.device, smoke=values.smoke)
    plan = smoke_plan() if values.smoke else full_plan()
    began = time.monotonic()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    watch = Stopwatch(device, plan.warm_ms, plan.measure_ms)
    torch.manual_seed(0)
    ceilings = measure_ceilings(watch, plan)
    print(f"{name}: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
          f"bf16 product {ceilings.flops / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    chosen = [part for part in SECTIONS if values.only in {"all", part}]
    rows = []
    jobs = (job for part in chosen for job in _jobs(part)(watch, plan, ceilings))
    for row in measure(jobs, began + values.budget):
        rows.append(row)
        print("  ".join(str(cell) for cell in row.cells() if cell is not None), flush=True)
    path = write_report(
        "gpu",
        values,
        [row.to_json() for row in rows],
        describe_machine(),
        values.out or _default_out(name, smoke=values.smoke),
        details={"gpu": name, "ceilings": ceilings, "seconds": time.monotonic() - began},
    )
    print(f"\nwritten: {path}\n\n{Table(HEADER, [row.cells() for row in rows]).text()}")
    return 1 if any(row.wrong or _failed(row) for row in rows) else 0


def measure(jobs: Iterable[Job], deadline: float) -> Iterator[Row]:
    """A row for every job: one that fails, or for which no time is left, says so in its row."""
    for job in jobs:
        if time.monotonic() > deadline:
            yield job.without("not measured: --budget was spent")
            continue
        try:
            yield job.run()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            yield job.without(f"{_FAILED}{type(error).__name__}: {first}")


_FAILED = "failed: "


def _failed(row: Row) -> bool:
    """A peer that runs out of memory, say, is a result and no failure of ours."""
    reason = row.unmeasured or ""
    return reason.startswith(_FAILED) and row.part != "peers"


def _jobs(part: str) -> Callable[..., Iterator[Job]]:
    if part == "attention":
        from kvrelay_bench.gpu.attention import attention_jobs

        return attention_jobs
    if part == "ops":
        from kvrelay_bench.gpu.ops import op_jobs

        return op_jobs
    from kvrelay_bench.gpu.model import model_jobs, peer_jobs

    return model_jobs if part == "model" else peer_jobs


def _device(wanted: str, *, smoke: bool):  # type: ignore[no-untyped-def] # torch is imported late
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() or not smoke else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("bench gpu needs an NVIDIA GPU, and torch sees none here; "
                         "--smoke runs every path at tiny shapes on the CPU")  # fmt: skip
    if not wanted.startswith("cuda") and not smoke:
        raise UsageError(f"--device {wanted}: only --smoke runs on a CPU")
    return torch.device(wanted)


def _default_out(name: str, *, smoke: bool) -> Path | None:
    """docs/results of a checkout; the cache folder for smoke runs and where there is no checkout."""
    if smoke or not _RESULTS.parent.is_dir():
        return None
    short = name.lower().removeprefix("nvidia ").replace(" ", "-")
    return _RESULTS / f"gpu-{short}.json"
