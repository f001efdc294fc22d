"""What `generate` and `chat` return; the names are vLLM's."""

from dataclasses import dataclass

from kvrelay_protocol.errors import KvrelayError


@dataclass(frozen=True, slots=True)
class Logprob:
    """One entry of an answer's `logprobs`."""

    logprob: float
    """Natural logarithm of the probability the model gave, before temperature and penalties."""
    rank: int
    """1 for the most likely token."""
    decoded_token: str | None
    """Text of this token alone; None with `detokenize=False`."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer."""

    index: int
    """Which of the `n` answers."""
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Sum over the answer's tokens; None without `logprobs`."""
    logprobs: list[dict[int, Logprob]] | None
    """By token id, one dict a token: the most likely ones and the token itself."""
    finish_reason: str
    """`stop`, `length`, or `error` where the engine could not go on with this answer."""
    stop_reason: int | str | None = None
    """The stop string or `stop_token_ids` entry that ended it; None for the model's own end token."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to one request, in seconds of `time.monotonic`."""

    arrival_time: float
    first_scheduled_time: float
    """Its prompt got its blocks and began to be computed."""
    first_token_time: float
    finished_time: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its answers."""

    request_id: str
    prompt: str | None
    """The text, where text was given; for a chat, what the template made of it."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """`n` of them, by index."""
    metrics: RequestMetrics | None
    num_cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    error: KvrelayError | None = None
    """Why answers of this request ended in `error`; the other requests are not concerned."""
    finished: bool = True
