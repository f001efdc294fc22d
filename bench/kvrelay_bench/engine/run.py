"""One point, repeated in this process through `LLM`: what a user's own script would see."""

import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from kvrelay.cli.settings import set_threads
from kvrelay_bench.compare.engines import Setting, our_spec
from kvrelay_bench.compare.points import Point, draw_prompts
from kvrelay_bench.compare.result import Measurement, Row, make_row
from kvrelay_bench.machine import BusyCores, describe_machine, probe_limits
from kvrelay_bench.models import ModelShape, find_model, read_shape
from kvrelay_bench.report import Table, write_report
from kvrelay_infra.host import read_cores
from kvrelay_protocol.errors import UsageError

_WARM_UP_SEED = 0


def run_engine(values: SimpleNamespace) -> int:
    """`kvrelay bench engine`.

    Raises:
        KvrelayError: model, point or device do not fit; one clear line.
    """
    threads = values.threads or read_cores()
    set_threads(threads)
    model = find_model(values.model)
    shape = read_shape(model)
    point = Point(values.batch, values.input_len, values.output_len)
    if point.input_len + point.output_len > shape.max_positions:
        raise UsageError(
            f"--input-len {point.input_len} and --output-len {point.output_len} exceed the "
            f"model's {shape.max_positions} tokens"
        )
    # Before the model is loaded: two processes would share the bandwidth.
    on_cpu = not _uses_gpu(values.device)
    limits = probe_limits(threads) if on_cpu else None
    if limits:
        print(f"machine: {limits}", flush=True)
    dtype = _dtype(values.dtype, model)
    setting = Setting(model, shape, threads, (point,), values.device)
    spec = our_spec(
        setting,
        dtype=dtype,
        quantization=None if values.quantization == "none" else values.quantization,
    )
    begun = time.perf_counter()
    engine = _load(dict(spec.options))
    loaded_s = time.perf_counter() - begun
    print(f"model: {model.name}, loaded in {loaded_s:.1f} s", flush=True)
    measured = _measure(engine, point, shape, values.rounds)
    row = make_row(point, spec, measured, shape, limits)
    print(f"\n{_table(row).text()}\n")
    path = write_report("engine", values, [row.to_json()], describe_machine(limits), values.out,
                        details={"loaded_s": loaded_s, "dtype": dtype,
                                 "calls": [asdict(call) for call in measured]})  # fmt: skip
    print(f"written: {path}")
    return 0


def _load(options: dict[str, Any]) -> Any:
    """The engine of `bench compare`, here in this process."""
    from kvrelay_bench.compare.workers.kvrelay_llm import Engine

    return Engine(options)


def _measure(engine: Any, point: Point, shape: ModelShape, rounds: int) -> list[Measurement]:
    """A call that is not counted, then the rounds, each with prompts of its own."""
    engine.generate(draw_prompts(point, shape.vocab_size, seed=_WARM_UP_SEED), point.output_len)
    measured = []
    for number in range(1, rounds + 1):
        prompts = draw_prompts(point, shape.vocab_size, seed=number)
        begun, own, cores = time.perf_counter(), time.process_time(), BusyCores()
        tokens = engine.generate(prompts, point.output_len)
        seconds, own = time.perf_counter() - begun, time.process_time() - own
        assert [len(row) for row in tokens] == [point.output_len] * point.batch
        measured.append(
            Measurement(point, "kvrelay", number, seconds, own, cores.foreign_share(own))
        )  # fmt: skip)
        rate = point.generated / seconds
        print(f"round {number}/{rounds}  {seconds:8.3f} s {rate:8.1f} tokens/s", flush=True)
    return measured


def _table(row: Row) -> Table:
    percent = [None if share is None else f"{share:.0%}"
               for share in (row.read_share, row.gemm_share, row.floor_share)]  # fmt: skip
    return Table(
        ("batch x in x out", "weights", "output tokens/s", "total tokens/s", "spread", "n", "read",
         "GEMM", "of floor"),
        [(row.point, row.dtype_class, row.output_per_s, row.total_per_s,
          f"{row.seconds.spread:.0%}", row.seconds.count, *percent)],
    )  # fmt: skip


def _dtype(dtype: str, model: Any) -> str:
    """What `auto` means for this checkpoint."""
    from kvrelay_engine.models.dtypes import resolve_dtype
    from kvrelay_engine.models.weights import load_model_config

    return str(resolve_dtype(dtype, load_model_config(model).checkpoint_dtype))


def _uses_gpu(device: str) -> bool:
    if device.startswith("cpu"):
        return False
    import torch

    return device.startswith("cuda") or torch.cuda.is_available()
