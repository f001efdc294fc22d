"""What callers hand in, checked and turned into token ids before anything is computed."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypeAlias, TypedDict

from kvrelay_protocol.errors import ContextOverflow, InvalidRequest

if TYPE_CHECKING:
    from kvrelay.offline.tokenizer import LLMTokenizer


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    cache_salt: NotRequired[str]
    """Blocks are shared in the prefix cache only between prompts with the same salt."""


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    """Its text, if known; handed back in the output."""
    cache_salt: NotRequired[str]


Prompt: TypeAlias = str | list[int] | TextPrompt | TokensPrompt
_A_MESSAGE = 'a message such as {"role": "user", "content": "hello"}'
_A_CONVERSATION = 'a list of messages such as {"role": "user", "content": "hello"}'
_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt that can be computed."""

    text: str | None
    ids: tuple[int, ...]
    context: tuple[int, ...]
    """Tokens the answer's text follows directly; none for chat, where an answer begins a turn."""
    salt: bytes = b""


def as_list(prompts: object) -> tuple[list[object], bool]:
    """Prompts one by one, and whether it was a single one.

    Raises:
        InvalidRequest: not a prompt and no list of prompts.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts], True
    if isinstance(prompts, Sequence) and not isinstance(prompts, bytes):
        single = bool(prompts) and all(isinstance(item, int) for item in prompts)
        return ([prompts], True) if single else (list(prompts), False)
    raise InvalidRequest(
        f"prompts is a {type(prompts).__name__}; it must be a string, "
        '{"prompt_token_ids": [...]}, or a list of these',
        param="prompts",
    )


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Checks prompts against one model."""

    tokenizer: "LLMTokenizer | None"
    """None with `skip_tokenizer_init`."""
    vocab_size: int
    max_model_len: int

    def read(self, prompt: object, where: str) -> TokenisedPrompt:
        """Tokenise one prompt and check it.

        Args:
            prompt: what the caller gave.
            where: its place among the others, for errors; such as `prompts[3]`.

        Raises:
            InvalidRequest: it is no prompt, has no tokens, or one the model has no row for.
            ContextOverflow: it leaves no room for an answer.
        """
        if isinstance(prompt, str):
            return self._from_text(prompt, where, "")
        if isinstance(prompt, Mapping):
            return self._from_mapping(prompt, where)
        if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
            return self._from_ids(prompt, where, None, "")
        raise _wrong(where, prompt, 'a string, a list of token ids or {"prompt_token_ids": [...]}')

    def read_rendered(self, text: str, where: str) -> TokenisedPrompt:
        """A conversation after its template, which wrote the special tokens itself."""
        return self._from_text(text, where, "", rendered=True)

    def _from_mapping(self, prompt: Mapping[Any, Any], where: str) -> TokenisedPrompt:
        unknown = next((key for key in prompt if key not in _KEYS), None)
        if unknown is not None:
            raise InvalidRequest(
                f"{where} has a key {unknown!r}; known are {', '.join(sorted(_KEYS))}", param=where
            )
        text, ids, salt = (prompt.get(k) for k in ("prompt", "prompt_token_ids", "cache_salt"))
        for name, value in (("prompt", text), ("cache_salt", salt)):
            if value is not None and not isinstance(value, str):
                raise _wrong(f"{where}[{name!r}]", value, "a string")
        if ids is not None:
            return self._from_ids(ids, where, text, salt or "")
        if text is None:
            raise InvalidRequest(
                f"{where} has neither a 'prompt' nor 'prompt_token_ids'; give one", param=where
            )
        return self._from_text(text, where, salt or "")

    def _from_text(
        self, text: str, where: str, salt: str, *, rendered: bool = False
    ) -> TokenisedPrompt:
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{where} is text, and skip_tokenizer_init=True loaded no tokenizer; "
                'give {"prompt_token_ids": [...]}',
                param=where,
            )
        if self.tokenizer.exceeds(text, self.max_model_len):
            raise self._overflow(where, f"more than {self.max_model_len}")
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=not rendered))
        self._check(ids, where)
        return TokenisedPrompt(text, ids, () if rendered else ids, salt.encode())

    def _from_ids(self, ids: object, where: str, text: str | None, salt: str) -> TokenisedPrompt:
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
            raise _wrong(where, ids, "a list of token ids")
        wrong = next((item for item in ids if not _is_id(item)), None)
        if wrong is not None:
            raise _wrong(where, wrong, "a list of token ids, all of them whole numbers")
        checked = tuple(operator.index(item) for item in ids)
        self._check(checked, where)
        return TokenisedPrompt(text, checked, checked, salt.encode())

    def _check(self, ids: tuple[int, ...], where: str) -> None:
        if not ids:
            raise InvalidRequest(f"{where} has no tokens; at least one is needed", param=where)
        if len(ids) >= self.max_model_len:
            raise self._overflow(where, str(len(ids)))
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            outside = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise InvalidRequest(
                f"{where} has token {outside}, outside the model's vocabulary of "
                f"{self.vocab_size}; was it made with another tokenizer?",
                param=where,
            )

    def _overflow(self, where: str, counted: str) -> ContextOverflow:
        return ContextOverflow(
            f"{where} has {counted} tokens; with one for the answer max_model_len="
            f"{self.max_model_len} allows {self.max_model_len - 1}",
            param=where,
        )


def _is_id(item: object) -> bool:
    return hasattr(item, "__index__") and not isinstance(item, bool)


def conversations(messages: object) -> list[tuple[str, object]]:
    """Each conversation with its place, for errors.

    Raises:
        InvalidRequest: neither a conversation nor a list of them.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _wrong("messages", messages, _A_CONVERSATION)
    if messages and all(isinstance(item, Mapping) for item in messages):
        return [("messages", messages)]
    return [(f"messages[{at}]", item) for at, item in enumerate(messages)]


def read_messages(messages: object, where: str) -> list[dict[str, Any]]:
    """A conversation, with text parts joined.

    Raises:
        InvalidRequest: not a list of messages with role and text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise _wrong(where, messages, _A_CONVERSATION)
    return [_read_message(item, f"{where}[{at}]") for at, item in enumerate(messages)]


def _read_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise _wrong(where, message, _A_MESSAGE)
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_read_part(part, where) for part in content)
    if not isinstance(content, str):
        raise _wrong(f"{where}['content']", content, "a string or a list of text parts")
    # `developer` is newer than most templates and means `system`.
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}


def _read_part(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and type(part.get("text")) is str:
        return str(part["text"])
    raise _wrong(f"{where}['content']", part, "a string or a list of text parts")


def _wrong(where: str, value: object, expected: str) -> InvalidRequest:
    shown = type(value).__name__ if isinstance(value, str | list | dict) else repr(value)
    return InvalidRequest(f"{where} is {shown[:60]}; it must be {expected}", param=where)
