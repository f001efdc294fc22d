"""llama.cpp's C interface: one batch for all prompts, then one decode call per step.

Runs in the peer's own environment. The next token is NumPy's argmax of the logits, the least a
greedy generation needs; no sampler chain, no tokenizer.
"""

import time
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np


class Engine:
    """Options: gguf, threads."""

    def __init__(self, options: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self._threads = options["threads"]
        self._model = llama_cpp.llama_model_load_from_file(
            options["gguf"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {options['gguf']}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._flash = True

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": version("llama-cpp-python")}

    def tune(self, prompts: list[list[int]], output_len: int) -> dict[str, str]:
        """Flash attention where a trial finds it faster."""
        seconds = {}
        for flash in (False, True):
            self._flash = flash
            self._decode(prompts, 2)
            begun = time.perf_counter()
            self._decode(prompts, output_len)
            seconds[flash] = time.perf_counter() - begun
        self._flash = seconds[True] < seconds[False]
        return {
            "flash attention": "on" if self._flash else "off",
            "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        return self._decode(prompts, output_len)[0]

    def check(
        self, prompts: list[list[int]], output_len: int, top: int
    ) -> tuple[list[list[int]], list[dict[int, float]]]:
        tokens, logits = self._decode(prompts, output_len)
        shifted = logits - logits.max(-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        best = np.argsort(-logprobs, axis=-1)[:, :top]
        return tokens, [
            {int(token): float(row[token]) for token in ids}
            for row, ids in zip(logprobs, best, strict=True)
        ]

    def _decode(self, prompts: list[list[int]], output_len: int) -> tuple[list[list[int]], Any]:
        """Greedy tokens of each prompt, and the logits [prompts, vocabulary] of the first ones."""
        context = self._context(prompts, output_len)
        batch = llama_cpp.llama_batch_init(sum(map(len, prompts)), 0, 1)
        try:
            ends = _fill(batch, prompts, [0] * len(prompts))
            first = logits = self._step(context, batch, ends)
            tokens = [[int(token)] for token in logits.argmax(-1)]
            for length in range(1, output_len):
                positions = [len(prompt) + length - 1 for prompt in prompts]
                ends = _fill(batch, [[row[-1]] for row in tokens], positions)
                logits = self._step(context, batch, ends)
                for row, token in zip(tokens, logits.argmax(-1), strict=True):
                    row.append(int(token))
            return tokens, first
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _context(self, prompts: list[list[int]], output_len: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        # The cache of each sequence is padded to a multiple of 256 cells.
        longest = max(map(len, prompts)) + output_len
        params.n_ctx = len(prompts) * (-(-longest // 256) * 256)
        params.n_seq_max = len(prompts)
        params.n_batch = max(512, sum(map(len, prompts)))
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if self._flash
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise SystemExit(f"llama.cpp makes no context of {params.n_ctx} tokens")
        return context

    def _step(self, context: Any, batch: Any, ends: list[int]) -> Any:
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        rows = [llama_cpp.llama_get_logits_ith(context, end) for end in ends]
        return np.stack([np.ctypeslib.as_array(row, (self._vocab_size,)) for row in rows])


def _fill(batch: Any, rows: list[list[int]], starts: list[int]) -> list[int]:
    """Put each sequence's new tokens into the batch; returns where each one's last token is."""
    ends = []
    index = 0
    for sequence, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
        for offset, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + offset
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = offset == len(tokens) - 1
            index += 1
        ends.append(index - 1)
    batch.n_tokens = index
    return ends
