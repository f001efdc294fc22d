"""kvrelay through its offline class."""

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from kvrelay import LLM, SamplingParams

# What `LLM` imports when it is constructed: here, it counts as importing.
for _name in ("kvrelay.offline.engine", "kvrelay_engine.loading"):
    importlib.import_module(_name)

_PHASES = {
    "weights, packing": ("kvrelay_engine.loading", "load_weights"),
    "warm-up": ("kvrelay_engine.runtime.warmup", "warm_up"),
}
"""Functions whose time is told apart while the engine loads."""


class Engine:
    """Options: what `LLM` takes."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.phases: dict[str, float] = {}
        with _timed(self.phases):
            self._llm = LLM(enable_prefix_caching=False, **options)

    def versions(self) -> dict[str, str]:
        return {"kvrelay": version("kvrelay"), "torch": str(torch.__version__)}

    def tune(self, prompts: list[list[int]], output_len: int) -> dict[str, str]:
        """Nothing to choose; the call warms the engine up."""
        self.generate(prompts, output_len)
        return {}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        return [list(found.token_ids) for found in self._run(prompts, output_len)]

    def check(
        self, prompts: list[list[int]], output_len: int, top: int
    ) -> tuple[list[list[int]], list[dict[int, float]]]:
        found = self._run(prompts, output_len, logprobs=top)
        first = [_as_floats(output.logprobs[0]) for output in found]
        return [list(output.token_ids) for output in found], first

    def _run(self, prompts: list[list[int]], output_len: int, **more: Any) -> list[Any]:
        params = SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False, **more
        )
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [output.outputs[0] for output in self._llm.generate(given, params, use_tqdm=False)]


def _as_floats(entries: Any) -> dict[int, float]:
    return {token: float(getattr(entry, "logprob", entry)) for token, entry in entries.items()}


@contextmanager
def _timed(seconds: dict[str, float]) -> Iterator[None]:
    """Let the functions of `_PHASES` note how long they take."""
    replaced = []
    for phase, (module_name, name) in _PHASES.items():
        module = importlib.import_module(module_name)
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, _timing(getattr(module, name), phase, seconds))
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def _timing(function: Callable[..., Any], phase: str, seconds: dict[str, float]) -> Any:
    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        result = function(*arguments, **named)
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begun
        return result

    return timed
