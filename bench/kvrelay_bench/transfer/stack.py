"""The hand-over inside a whole stack: how much of it a user waits for."""

import random
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import httpx

from kvrelay_bench.serve.stack import Target, own_stack
from kvrelay_protocol.errors import TransferError

_KV_MEMORY = 1024**3
_FEW_TOKENS = 4
_REQUEST_LIMIT_S = 600.0


def measure_stack(
    model: str, prompts: Sequence[int], rounds: int, *, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Ask a stack of `kvrelay up` prompts of each length, one at a time, with the pools otherwise idle.

    Args:
        model: a benchmark size, a folder or a hub id.
        prompts: lengths in tokens.
        rounds: of every length, interleaved.
        say: takes lines of progress.

    Returns:
        One object a request: `tokens`, `ttft_ms` (from admission to the first token), `prefill_ms`,
        `kv_transfer_ms`, `kv_exposed_ms`, `kv_bytes` as the router reports them.

    Raises:
        StartupError: the stack does not start.
        TransferError: a request was not answered by way of both pools.
    """
    values = SimpleNamespace(model=model, kv_memory=_KV_MEMORY)
    generator = random.Random(0)
    found: list[dict[str, Any]] = []
    with own_stack(values, say) as target, httpx.Client(timeout=_REQUEST_LIMIT_S) as client:
        for tokens in prompts:
            _ask(client, target, generator, tokens)  # touches buffers and caches for the first time
        for number in range(rounds):
            begun = time.monotonic()
            found += [_ask(client, target, generator, tokens) for tokens in prompts]
            say(f"stack round {number + 1} of {rounds}: {time.monotonic() - begun:.1f} s")
    return found


def _ask(
    client: httpx.Client, target: Target, generator: random.Random, tokens: int
) -> dict[str, Any]:
    # Never the same prompt twice: what a prefix cache holds would not be moved.
    prompt = [generator.randrange(target.vocabulary // 2) for _ in range(tokens)]
    body = {"model": target.model, "prompt": prompt, "max_tokens": _FEW_TOKENS, "temperature": 0,
            "ignore_eos": True}  # fmt: skip
    response = client.post(f"{target.base_url}/v1/completions", json=body)
    timings = response.json().get("kvrelay", {})
    if timings.get("path") != "disaggregated":
        raise TransferError(
            f"a prompt of {tokens} tokens was not handed over: {response.status_code} "
            f"{response.text[:200]}"
        )
    names = ("prefill_ms", "kv_transfer_ms", "kv_exposed_ms", "kv_bytes")
    return {"tokens": tokens, "ttft_ms": timings["time_to_first_token_ms"]} | {
        name: timings[name] for name in names
    }
