"""Parameters this server doesn't act on: refused where they would change the answer, else ignored."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvrelay_router.http.errors import UnsupportedParameter

# Each with the values that ask for nothing. docs/api.md lists them.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "structured_outputs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

_SHOWN_NAMES = 20


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Check the parameters that aren't built.

    Raises:
        UnsupportedParameter: one has a value that would change the answer.
    """
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and not any(_same(value, allowed) for allowed in neutral):
            raise UnsupportedParameter(f"{name} is not supported by this server", param=name)
    messages = body.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        if not isinstance(message, dict):
            continue
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name):
                param = f"messages[{index}].{name}"
                raise UnsupportedParameter(f"{param} is not supported by this server", param=param)


def _same(value: Any, neutral: Any) -> bool:
    # In Python False equals 0; in JSON it does not.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def ignored_header(body: Mapping[str, Any], known: Iterable[str]) -> dict[str, str]:
    """`X-Ignored-Params`: what the client sent and nobody read."""
    ignored = sorted(set(body) - set(known) - set(NEUTRAL))
    if not ignored:
        return {}
    # Names are the client's; a header takes only a few characters.
    safe = ["".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "?" for c in name[:64])
            for name in ignored[:_SHOWN_NAMES]]  # fmt: skip
    return {"x-ignored-params": ", ".join([*safe, "..."] if len(ignored) > len(safe) else safe)}
