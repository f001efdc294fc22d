"""Ask, print the answer as it comes, and say afterwards what happened to the request."""

import contextlib
import importlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn, TextIO

from kvrelay import (
    ChatOptions,
    Client,
    ColdStart,
    KvrelayClientError,
    Message,
    Queued,
    Resumed,
    TextDelta,
    Timings,
    Usage,
)
from kvrelay.cli.units import format_size

_RATED_BYTES = 1024 * 1024
"""Below this a transfer's time is set-up and round trips, and a rate would say nothing of the link."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, complete or stopped by the user."""

    text: str
    timings: Timings
    usage: Usage | None
    trace_id: str | None
    stopped: bool


def stream_reply(
    client: Client, messages: Sequence[Message], options: ChatOptions, out: TextIO
) -> Reply:
    """Print the text while it arrives. Ctrl-C stops the answer, here and on the server."""
    usage: Usage | None = None
    starting: tuple[str, str] | None = None
    text = ""
    stopped = False
    with client.stream(messages, **options) as stream:
        try:
            for event in stream:
                match event:
                    case TextDelta(text=piece):
                        text += piece
                        out.write(piece)
                        out.flush()
                    case Queued(position=position) if position > 0:
                        out.write(f"(waiting, number {position})\n")
                    case ColdStart(pool=pool, phase=phase) if (pool, phase) != starting:
                        starting = (pool, phase)
                        does = (
                            "wakes up" if phase == "wake" else f"starts: {phase.replace('_', ' ')}"
                        )
                        out.write(f"(a {pool} worker {does})\n")
                    case Resumed(gap_s=gap):
                        out.write(f"⟲{gap:.1f}s ")
                    case Usage():
                        usage = event
                    case _:
                        pass
        except KeyboardInterrupt:
            # Leaving the block cancels the request in both pools.
            stopped = True
        timings, trace_id = stream.timings, stream.trace_id
    out.write(" [stopped]\n" if stopped else "\n")
    out.flush()
    return Reply(text, timings, usage, trace_id, stopped)


def card(reply: Reply, link: str | None = None) -> str:
    """What happened to one request, a line each; what nobody measured is left out.

    Args:
        link: what the transport reaches with large messages, where it was probed.
    """
    timings, usage = reply.timings, reply.usage
    lines = [("path", _path(timings))]
    if timings.client_ttft_ms is not None:
        lines.append(("TTFT", f"{timings.client_ttft_ms:.0f} ms from sending to the first text"))
    if timings.tokens_per_s is not None:
        count = f", {usage.completion_tokens} tokens" if usage else ""
        lines.append(("speed", f"{timings.tokens_per_s:.1f} tokens/s{count}"))
    if timings.kv_bytes:
        lines.append(("KV moved", _moved(timings)))
    if link is not None:
        lines.append(("link", link))
    cached = timings.cached_tokens
    if cached is None and usage is not None:
        cached = usage.cached_tokens
    if cached is not None:
        prompt = f" of {usage.prompt_tokens} prompt tokens" if usage else " prompt tokens"
        lines.append(("cached", f"{cached}{prompt}"))
    if timings.replays:
        lines.append(("replays", f"{timings.replays} (a worker was lost)"))
    lines.append(("trace", reply.trace_id or "none"))
    return "\n".join(f"  {name:<9} {text}" for name, text in lines)


def _path(timings: Timings) -> str:
    reason = f" ({timings.reason})" if timings.reason else ""
    decode = timings.decode_worker or "?"
    if timings.prefill_worker and timings.path != "local":
        return f"{timings.path}: {timings.prefill_worker} → {decode}{reason}"
    return f"{timings.path or 'unknown'}: {decode}{reason}"


def _moved(timings: Timings) -> str:
    moved = format_size(timings.kv_bytes or 0)
    over = f" over {timings.kv_transport}" if timings.kv_transport else ""
    if timings.kv_gbps is not None and (timings.kv_bytes or 0) >= _RATED_BYTES:
        took = f" at {timings.kv_gbps:.2f} GB/s"
    else:
        took = f" in {timings.kv_transfer_ms:.1f} ms" if timings.kv_transfer_ms is not None else ""
    exposed = timings.kv_exposed_ms
    hidden = f", {exposed:.1f} ms of it after the prefill" if exposed is not None else ""
    return f"{moved}{over}{took}{hidden}"


def describe_error(error: KvrelayClientError) -> str:
    """One line for the terminal."""
    return " ".join(str(error).split()) or type(error).__name__


def edit_lines() -> None:
    """Arrow keys and history in `input`, where Python was built with it."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")


def exit_on_sigterm() -> None:
    """Make SIGTERM leave through the `with` blocks, so that what they started is stopped."""

    def on_signal(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
