"""Usage and timings as they go out."""

from typing import Any

from kvrelay_router.requests.types import RequestStats


def usage_object(
    *,
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def timings_object(stats: RequestStats) -> dict[str, Any]:
    """Ours: the `timings` event of a stream and the `kvrelay` key of a whole answer.

    `tokens_per_second` is tokens after the first over the time since it; `kv_gbps` is 10^9 bytes a
    second while blocks moved; `kv_exposed_ms` is the part of the transfer that prefill did not hide: from
    the computed prompt to the decode worker's having all of its KV.
    """
    later_tokens = max(stats.completion_tokens - 1, 0)
    return {
        "queue_ms": _ms(stats.queue_s),
        "prefill_ms": _ms(stats.prefill_s),
        "kv_transfer_ms": _ms(stats.kv_transfer_s),
        "kv_exposed_ms": _ms(stats.kv_exposed_s),
        "decode_ms": _ms(stats.decode_s),
        "time_to_first_token_ms": _ms(stats.time_to_first_token_s),
        "tokens_per_second": _rate(later_tokens, stats.decode_s, 2),
        "kv_bytes": stats.kv_bytes,
        "kv_transport": stats.kv_transport,
        "kv_gbps": _rate(stats.kv_bytes / 1e9, stats.kv_transfer_s, 3),
        "cached_tokens": stats.cached_tokens,
        "path": stats.path.kind.value,
        "reason": stats.path.reason,
        "prefill_worker": stats.path.prefill_worker,
        "decode_worker": stats.path.decode_worker,
        "replays": stats.replays,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(amount: float, seconds: float, digits: int) -> float:
    return round(amount / seconds, digits) if seconds > 0 else 0.0
