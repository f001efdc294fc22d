"""transformers' `generate`. Runs in the peer's own environment."""

import time
from typing import Any

import torch
import transformers


class Engine:
    """Options: model, dtype, threads."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=getattr(torch, options["dtype"]), attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None  # fixed lengths
        self._model.generation_config.pad_token_id = 0
        self._cache: str | None = None

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": str(torch.__version__)}

    def tune(self, prompts: list[list[int]], output_len: int) -> dict[str, str]:
        """A static cache saves copies and attends to empty places: which wins, a trial decides."""
        seconds: dict[str | None, float] = {}
        for cache in (None, "static"):
            self._cache = cache
            self._run(prompts, 2)
            begun = time.perf_counter()
            self._run(prompts, output_len)
            seconds[cache] = time.perf_counter() - begun
        self._cache = min(seconds, key=lambda cache: seconds[cache])
        return {"cache": self._cache or "dynamic"}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        generated: list[list[int]] = self._run(prompts, output_len)[:, len(prompts[0]) :].tolist()
        return generated

    def check(
        self, prompts: list[list[int]], output_len: int, top: int
    ) -> tuple[list[list[int]], list[dict[int, float]]]:
        tokens = self.generate(prompts, output_len)
        with torch.inference_mode():
            logits = self._model(torch.tensor(prompts), logits_to_keep=1).logits[:, -1].float()
        best = logits.log_softmax(-1).topk(top)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tokens, [dict(zip(ids, values, strict=True)) for ids, values in pairs]

    def _run(self, prompts: list[list[int]], output_len: int) -> Any:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                do_sample=False,
                cache_implementation=self._cache,
                disable_compile=True,
            )
