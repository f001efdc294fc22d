"""Medians of device time, and what the inputs and outputs of a measurement need."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

_CALLS_IN_GRAPH = 20
_SMALLEST_SAMPLE = 5


@dataclass(frozen=True, slots=True)
class Timed:
    """Median seconds of one call."""

    eager: float
    graph: float | None
    """None where the calls can't be captured, or on a CPU."""

    @property
    def seconds(self) -> float:
        return self.eager if self.graph is None else self.graph


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Times calls on one device."""

    device: torch.device
    warm_ms: float
    measure_ms: float

    def time(self, calls: Sequence[Call]) -> Timed:
        """Median of one call, going round the calls: each works on inputs of its own."""
        if self.device.type != "cuda":
            return Timed(self._on_host(calls), None)
        from triton.testing import do_bench

        turns = itertools.cycle(calls)

        def call_next() -> None:
            next(turns)()

        eager_ms = do_bench(
            call_next,
            warmup=self.warm_ms,
            rep=self.measure_ms,
            return_mode="median",
        )
        return Timed(eager_ms / 1e3, self._replayed(calls, eager_ms))

    def _replayed(self, calls: Sequence[Call], eager_ms: float) -> float | None:
        """Median over replays of a graph of all calls: launch gaps shrink as they do in the engine."""
        rounds = max(1, _CALLS_IN_GRAPH // len(calls))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in list(calls) * rounds:
                    call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        count = rounds * len(calls)
        graph.replay()
        samples: list[float] = []
        for _ in range(max(_SMALLEST_SAMPLE, int(self.measure_ms / max(eager_ms * count, 1e-3)))):
            begin, end = _event(), _event()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / count / 1e3)
        return statistics.median(samples)

    def _on_host(self, calls: Sequence[Call]) -> float:
        for call in calls:
            call()
        samples: list[float] = []
        begun = time.perf_counter()
        for call in itertools.cycle(calls):
            start = time.perf_counter()
            call()
            now = time.perf_counter()
            samples.append(now - start)
            if now - begun > self.measure_ms / 1e3 and len(samples) >= _SMALLEST_SAMPLE:
                return statistics.median(samples)
        raise AssertionError("no calls")


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # of torch


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """NaN everywhere, so that what a kernel does not write fails the check."""
    return torch.full_like(like, float("nan"))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64; NaN if any is NaN."""
    wide = expected.double()
    return float((actual.double() - wide).norm() / wide.norm())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
