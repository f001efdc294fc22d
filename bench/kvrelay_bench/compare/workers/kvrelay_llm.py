"""kvrelay through its offline class."""

from importlib.metadata import version
from typing import Any

import torch

from kvrelay import LLM, SamplingParams


class Engine:
    """Options: model, dtype, quantization, device, threads, max_model_len, max_num_seqs."""

    def __init__(self, options: dict[str, Any]) -> None:
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
