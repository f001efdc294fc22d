"""What clients send, as pydantic sees it. Edge only: nothing here goes past `validation`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
_TOKEN_ID_LIMIT = 2**31
_ROLES = ("system", "developer", "user", "assistant")


def _fail(message: str) -> PydanticCustomError:
    return PydanticCustomError("value", "{message}", {"message": message})


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _fail("must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text":
            raise _fail("only parts of type 'text' are supported")
        if not isinstance(text, str):
            raise _fail("a text part needs a string 'text'")
        texts.append(text)
    return "".join(texts)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _fail("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise _fail(f"at most {MAX_STOPS} stop strings")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise _fail(f"a stop string has 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(i) is int and 0 <= i < _TOKEN_ID_LIMIT for i in value
    )


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not _is_token_ids(value):
        raise _fail("must be a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise _fail(f"at most {MAX_STOP_TOKEN_IDS} stop token ids")
    return tuple(value)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """The four forms of `prompt`, all as a sequence of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise _fail(
            "must be a string, a list of strings, a list of token ids, or a list of such lists"
        )
    if _is_token_ids(value):
        return (tuple(value),)
    if len(value) > MAX_CHOICES:
        raise _fail(f"at most {MAX_CHOICES} prompts")
    if all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    if all(_is_token_ids(prompt) for prompt in value):
        return tuple(tuple(prompt) for prompt in value)
    raise _fail("must be a string, a list of strings, a list of token ids, or a list of such lists")


def _null_is_default(default: Any) -> BeforeValidator:
    """An explicit null means "not given", as in OpenAI's schema."""
    return BeforeValidator(lambda value: default if value is None else value)


Stops = Annotated[tuple[str, ...], PlainValidator(_stops)]
StopTokenIds = Annotated[tuple[int, ...], PlainValidator(_stop_token_ids)]
Flag = Annotated[bool, _null_is_default(default=False)]
Content = Annotated[str, PlainValidator(_content)]


class Schema(BaseModel):
    """Strict: no string is a number here, NaN and infinity are no numbers at all."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class ChatMessage(Schema):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


# The first bad item ends the check: a finding each for millions of them would cost minutes.
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=_TOKEN_ID_LIMIT)]], Field(fail_fast=True)]


class StreamOptions(Schema):
    """Extras of a stream."""

    include_usage: Flag = False
    continuous_usage_stats: Flag = False


class GenerateBody(Schema):
    """What chat and plain completions share."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=1, lt=_TOKEN_ID_LIMIT)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_TOKEN_ID_LIMIT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), _null_is_default(default=1)] = 1
    stop: Stops = ()
    stop_token_ids: StopTokenIds = ()
    ignore_eos: Flag = False
    stream: Flag = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    user: Any = None
    metadata: Any = None

    def requested_max_tokens(self) -> int | None:
        return self.max_tokens


class ChatBody(GenerateBody):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_TOKEN_ID_LIMIT)] | None = None

    def requested_max_tokens(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


class CompletionBody(GenerateBody):
    """`POST /v1/completions`."""

    prompt: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_prompts)]
    echo: Flag = False


class TokenizeBody(Schema):
    """`POST /tokenize`: a prompt or a conversation."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Annotated[bool, _null_is_default(default=True)] = True


class DetokenizeBody(Schema):
    """`POST /detokenize`."""

    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: TokenIds
