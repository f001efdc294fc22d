"""A model folder's tokenizer, without torch or transformers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders

from kvrelay_protocol.errors import InvalidModel
from kvrelay_router.text.detokenize import (
    ByteLevelDetokenizer,
    Detokenizer,
    TokenBytes,
    WindowDetokenizer,
)

_NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

_SHORT_CHARS = 2048
"""Up to here `encode`, which holds the interpreter for its whole run, is done in a millisecond."""
_PROBED_CHARS_PER_TOKEN = 8
"""Texts with fewer characters for each token that fits are tokenised without a probe."""
_PROBE_CHARS = 16 * 1024


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Some tokenizer.json files still carry the truncation and padding of their training run.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._token_bytes: TokenBytes | None = None
        if isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            self._token_bytes = TokenBytes(backend.id_to_token, self._special_ids)
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text, with the tokens its model begins or ends texts with where asked for."""
        if len(text) <= _SHORT_CHARS:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        # The batch call lets other threads run meanwhile, and no one asks for the offsets it omits.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def surely_exceeds(self, text: str, limit: int) -> bool:
        """Whether a text has more than `limit` tokens, found out by reading no more than needed.

        Only far too long texts are noticed: tokenising megabytes that can't be served anyway takes
        seconds and hundreds of bytes of memory a token.
        """
        if len(text) <= max(limit, 1) * _PROBED_CHARS_PER_TOKEN:
            return False
        found = 0
        for start in range(0, len(text), _PROBE_CHARS):
            piece = text[start : start + _PROBE_CHARS]
            found += len(self.encode(piece, add_special_tokens=False))
            # A cut can't double the tokens of a piece, so twice the limit is certain.
            if found > 2 * limit:
                return True
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        """A fresh incremental decoder for a text that follows `context`."""
        if self._token_bytes is not None:
            return ByteLevelDetokenizer(self._token_bytes)
        return WindowDetokenizer(
            self.decode,
            self._backend.id_to_token,
            self._special_ids,
            context,
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        InvalidModel: it can't be read.
    """
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:
        raise InvalidModel(f"{path} can't be read as a tokenizer: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """An optional JSON object; empty where there is no such file.

    Raises:
        InvalidModel: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidModel(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidModel(f"{path} holds a {type(raw).__name__}, not a JSON object")
    return raw


def named_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token` and its like, as chat templates expect them."""
    found: dict[str, Any] = {}
    for name in _NAMED_TOKENS:
        token = _token_text(tokenizer_config.get(name))
        if token is not None:
            found[name] = token
    extra = tokenizer_config.get("additional_special_tokens")
    if isinstance(extra, list):
        found["additional_special_tokens"] = [t for t in map(_token_text, extra) if t is not None]
    return found


def _token_text(raw: Any) -> str | None:
    text = raw.get("content") if isinstance(raw, dict) else raw
    return text if isinstance(text, str) else None
