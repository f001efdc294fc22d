"""What is asked and when: lengths, arrival processes, prompts. Pure, and the same for the same seed."""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

FIRST_TOKEN = 3
"""The lowest id drawn for a prompt: the very first ones are begin, end and padding almost anywhere."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request before it is sent."""

    number: int
    arrival_s: float
    """Seconds after the start of the run; a closed loop does not look at it."""
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's leading blocks: equal ids are equal tokens."""
    block_tokens: int = 0
    """Tokens that each of `blocks` stands for."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A number of tokens from `low` to `high`, all equally likely."""

    low: int
    high: int

    def draw(self, generator: random.Random) -> int:
        return generator.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def parse_lengths(text: str) -> Lengths:
    """`128`, or `64-512` for lengths drawn evenly between the two."""
    low, dash, high = text.partition("-")
    try:
        lengths = Lengths(int(low), int(high if dash else low))
    except ValueError:
        lengths = Lengths(0, 0)
    if not 1 <= lengths.low <= lengths.high:
        raise ValueError("must be a number of tokens such as 128, or a range such as 64-512")
    return lengths


def synthetic(
    count: int, inputs: Lengths, outputs: Lengths, *, seed: int = 0
) -> list[PlannedRequest]:
    """Requests that share nothing and have no arrival times yet."""
    generator = random.Random(f"lengths {seed}")  # repeatable, not secret
    return [
        PlannedRequest(number, 0.0, inputs.draw(generator), outputs.draw(generator))
        for number in range(count)
    ]


def poisson(
    requests: Sequence[PlannedRequest], rate: float, *, seed: int = 0
) -> list[PlannedRequest]:
    """The requests with arrivals of a Poisson process of `rate` a second, the first at 0."""
    generator = random.Random(f"arrivals {seed}")  # repeatable, not secret
    gaps = (generator.expovariate(rate) for _ in requests[1:])
    times = itertools.accumulate(gaps, initial=0.0)
    return [
        replace(request, arrival_s=time) for request, time in zip(requests, times, strict=False)
    ]


@dataclass(frozen=True, slots=True)
class Clipped:
    """Requests that keep to limits, and how many of them were cut for it."""

    requests: list[PlannedRequest]
    cut: int


def clip(
    requests: Iterable[PlannedRequest],
    *,
    max_input: int | None = None,
    max_output: int | None = None,
    max_context: int | None = None,
) -> Clipped:
    """Cut prompts at their end and answers, so that all fit; arrivals stay as they are.

    Args:
        requests: any.
        max_input: longest prompt, in tokens.
        max_output: longest answer, in tokens.
        max_context: longest prompt plus answer; the answer gives way first, down to one token.
    """
    kept: list[PlannedRequest] = []
    cut = 0
    for request in requests:
        inputs = min(request.input_tokens, max_input or request.input_tokens)
        outputs = min(request.output_tokens, max_output or request.output_tokens)
        if max_context is not None:
            inputs = min(inputs, max_context - 1)
            outputs = min(outputs, max_context - inputs)
        fitted = replace(request, input_tokens=inputs, output_tokens=outputs)
        cut += fitted != request
        kept.append(fitted)
    return Clipped(kept, cut)


class Prompts:
    """Token ids of prompts: exact in length, shared where blocks are shared, else all different."""

    def __init__(self, vocabulary: int, *, seed: int = 0) -> None:
        """Args: `vocabulary` bounds the ids drawn, from `FIRST_TOKEN` up."""
        if vocabulary <= FIRST_TOKEN:
            raise ValueError(f"a vocabulary of {vocabulary} leaves no ids to draw")
        self._ids = range(FIRST_TOKEN, vocabulary)
        self._seed = seed

    def tokens(self, request: PlannedRequest) -> list[int]:
        """`input_tokens` ids: the request's blocks, then tokens of its own."""
        shared: Iterator[int] = itertools.chain.from_iterable(
            self._draw(f"block {block}", request.block_tokens) for block in request.blocks
        )
        prompt = list(itertools.islice(shared, request.input_tokens))
        rest = request.input_tokens - len(prompt)
        return prompt + self._draw(f"request {request.number}", rest)

    def _draw(self, name: str, count: int) -> list[int]:
        # Seeded by text: hashed by SHA-512, so that neighbouring numbers share nothing.
        generator = random.Random(f"{self._seed} {name}")  # repeatable, not secret
        return generator.choices(self._ids, k=count)


def completion_body(
    model: str,
    prompt: Sequence[int],
    output_tokens: int,
    *,
    salt: str = "",
    count_tokens: bool = False,
) -> bytes:
    """A streamed greedy completion of exactly `output_tokens`, in the dialect of vLLM and llama.cpp.

    Args:
        model: the name the server knows.
        prompt: token ids.
        output_tokens: `max_tokens`, with the end token ignored.
        salt: only requests with the same one share cached prefixes.
        count_tokens: ask for the number of tokens so far in every chunk.
    """
    options = {"include_usage": True} | ({"continuous_usage_stats": True} if count_tokens else {})
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": options,
    }
    if salt:
        body["cache_salt"] = salt
    return json.dumps(body, separators=(",", ":")).encode()
