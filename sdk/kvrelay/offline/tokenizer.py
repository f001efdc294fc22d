"""The model's tokenizer and chat template, as `LLM.get_tokenizer()` hands them out."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvrelay_protocol.errors import InvalidRequest
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_router.text.chat_template import ChatTemplate
from kvrelay_router.text.detokenize import (
    ByteLevelDetokenizer,
    Detokenizer,
    TokenBytes,
    WindowDetokenizer,
)
from kvrelay_router.text.served_model import ServedModel
from kvrelay_router.text.tokenizer import named_tokens, read_json


class LLMTokenizer:
    """Text to ids and back, exactly as the server does it. Method names are transformers'."""

    def __init__(self, served: ServedModel, directory: Path) -> None:
        self._served = served
        self._directory = directory
        self._token_texts: dict[int, str] = {}

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows; the model's own vocabulary may be padded beyond it."""
        return self._served.tokenizer.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends an answer."""
        return self._served.eos_token_ids

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What generation_config.json says about sampling."""
        return self._served.sampling_defaults

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the tokens its model begins texts with unless told otherwise."""
        return self._served.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        if skip_special_tokens:
            return self._served.tokenizer.decode(token_ids)
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Id of a token by its name; None where there is none."""
        return self._served.tokenizer.token_id(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
    ) -> str | list[int]:
        """The prompt of a conversation, as ids or, with `tokenize=False`, as text; see `render`."""
        text = self.render(messages, chat_template, add_generation_prompt=add_generation_prompt)
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation's prompt.

        Raises:
            InvalidRequest: the model has no template, or it refuses the messages.
            InvalidModel: `chat_template` does not compile.
        """
        template = self._template(chat_template)
        return template.render(messages, add_generation_prompt=add_generation_prompt)

    def exceeds(self, text: str, limit: int) -> bool:
        """Whether a text has far more than `limit` tokens, found out without tokenising all of it."""
        return self._served.tokenizer.surely_exceeds(text, limit)

    def detokenizer(
        self, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """An incremental decoder for what follows `context`."""
        if skip_special_tokens:
            return self._served.tokenizer.detokenizer(context)
        backend = self._backend
        if self._is_byte_level:
            return ByteLevelDetokenizer(self._all_token_bytes)
        return WindowDetokenizer(
            functools.partial(backend.decode, skip_special_tokens=False),
            backend.id_to_token,
            (),
            context,
        )

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, special or not."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def _template(self, source: str | None) -> ChatTemplate:
        if source is not None:
            named = named_tokens(read_json(self._directory / "tokenizer_config.json"))
            return ChatTemplate(source, named)
        if self._served.template is None:
            raise InvalidRequest(
                f"{self._served.name} has no chat template; use generate(), or pass chat_template",
                param="messages",
            )
        return self._served.template

    @functools.cached_property
    def _backend(self) -> Any:
        """Read again where special tokens are to be shown: the server's own never shows them."""
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(self._directory / "tokenizer.json"))

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        import tokenizers.decoders

        return isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel)

    @functools.cached_property
    def _all_token_bytes(self) -> TokenBytes:
        return TokenBytes(self._backend.id_to_token, ())
