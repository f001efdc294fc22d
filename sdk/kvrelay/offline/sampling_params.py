"""`SamplingParams` as users of vLLM know it; each field is checked when it is constructed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrelay.offline.arguments import refuses_sampling_arguments
from kvrelay_protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from kvrelay_protocol.sampling import SamplingParams as EngineSampling

_GREEDY_BELOW = 1e-5
"""Dividing logits by less than this gains nothing over taking the most likely token."""


@refuses_sampling_arguments
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How answers are sampled. Immutable: `dataclasses.replace` makes a changed copy.

    Names and meaning are vLLM's. What vLLM has and this engine has not is refused by name.

    Raises:
        InvalidRequest: a value is out of range; `param` names the field.
        TypeError: an unknown name.
    """

    n: int = 1
    """Answers to each prompt."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token generated before; -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time it was generated before; -2 to 2."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of prompt and answer become less likely. Above 0."""
    temperature: float = 1.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; [0, 1]."""
    seed: int | None = None
    """Same seed, same prompt, same model: same answer. None draws one from the engine's seed."""
    stop: str | list[str] | tuple[str, ...] | None = None
    """Strings that end the answer; they are not part of its text."""
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    """Tokens that end the answer, next to the model's own; part of its `token_ids`, not of its text."""
    ignore_eos: bool = False
    """Go on after the model's end token."""
    max_tokens: int | None = 16
    """Tokens of an answer; None: as many as `max_model_len` leaves."""
    min_tokens: int = 0
    """No stop token or stop string ends the answer before it has this many tokens."""
    logprobs: int | None = None
    """Report the logprob of each token, and of this many most likely ones; -1: of all."""
    detokenize: bool = True
    """False leaves the text empty."""
    skip_special_tokens: bool = True
    """Leave the model's control tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the stop token, at the end of the text."""

    def __post_init__(self) -> None:
        self._check_distribution()
        self._check_counts()
        self._check_stops()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    def for_engine(self, seed: int, vocab_size: int) -> "EngineSampling":
        """The engine's own type, with the seed of one answer."""
        from kvrelay_protocol.sampling import SamplingParams as EngineSampling

        return EngineSampling(
            temperature=0.0 if self.greedy else float(self.temperature),
            top_k=max(self.top_k, 0),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            seed=seed % 2**64,
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            repetition_penalty=float(self.repetition_penalty),
            min_tokens=self.min_tokens,
            logprobs=vocab_size if self.logprobs == -1 else self.logprobs,
        )

    def _check_counts(self) -> None:
        _whole("n", self.n, 1)
        _whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise _wrong("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, -1)
        if self.seed is not None:
            _whole("seed", self.seed, None)
        if self.greedy and self.n > 1:
            raise _wrong(
                "n",
                self.n,
                "1 with temperature=0, whose answers are all the same; raise temperature",
            )

    def _check_distribution(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)

    def _check_stops(self) -> None:
        for name in ("ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if not _all_of(self.stop_strings, str) or "" in self.stop_strings:
            raise _wrong("stop", self.stop, "a string or a list of strings, none of them empty")
        if self.stop_strings and not self.detokenize:
            raise _wrong("stop", self.stop, "None with detokenize=False, which makes no text")
        if not _all_of(self.stop_token_ids or (), int):
            raise _wrong("stop_token_ids", self.stop_token_ids, "a list of token ids")


def _all_of(values: object, kind: type) -> bool:
    return isinstance(values, Iterable) and all(type(value) is kind for value in values)


def _whole(name: str, value: object, low: int | None) -> None:
    if type(value) is not int or (low is not None and value < low):
        raise _wrong(name, value, "a whole number" + ("" if low is None else f" of at least {low}"))


def _number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and low <= value <= high and (value > low or not open_low):
        return
    above = f"above {low:g}" if open_low else f"at least {low:g}"
    raise _wrong(
        name, value, f"a number {above}" + (f" and at most {high:g}" if high < math.inf else "")
    )


def _wrong(name: str, value: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value!r}; it must be {expected}", param=name)
