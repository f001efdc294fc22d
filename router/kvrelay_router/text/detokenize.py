"""Token ids to text, piece by piece, such that the pieces joined are exactly a whole decode.

A piece is given out only when no later token can change it: half a character waits, and a
replacement character appears only where the bytes are certain to be invalid.

Two decoders, chosen by the tokenizer's own:

- byte-level tokenizers (Llama 3, Qwen, GPT-2): every token is a byte string, so an incremental UTF-8
  decoder is exact and costs one table look-up a token;
- all others: decode a small window whose beginning is already out, and give out what is new.
  `tokenizers.DecodeStream` works like this too, but has traps: a skipped special token makes its
  window lose the space before the next word, an invalid byte after a valid one raises, nothing
  flushes the end, and a window that begins inside a character repeats its text.
"""

import codecs
import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 8


class Detokenizer(Protocol):
    """Text of one growing sequence of tokens."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that became certain with these tokens; often empty."""

    def flush(self) -> str:
        """What is left at the end; a cut character becomes a replacement character."""


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE vocabularies write bytes with (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_alphabet()


class TokenBytes:
    """Bytes of each token of a byte-level vocabulary, filled as tokens are met."""

    def __init__(self, token_of: Callable[[int], str | None], skipped: Collection[int]) -> None:
        """Args: `token_of` names a token by its id; `skipped` ids have no text."""
        self._token_of = token_of
        self._known: dict[int, bytes] = dict.fromkeys(skipped, b"")
        self.texts: dict[int, str | None] = {}
        """What `text` found out so far."""

    def text(self, token_id: int) -> str | None:
        """A token's text where it begins and ends between characters; None where it cuts one."""
        try:
            text: str | None = self[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self.texts[token_id] = text
        return text

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = self._token_of(token_id)
        if token is None:
            return b""  # models pad their vocabulary with ids that are no token
        if all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return token.encode()  # an added token is written as it is


class ByteLevelDetokenizer:
    """For tokenizers whose decoder is `ByteLevel`."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        self._utf8 = _Utf8Decoder("replace")
        self._inside = False
        """What was pushed ends inside a character."""

    def push(self, ids: Sequence[int]) -> str:
        if len(ids) == 1 and not self._inside:  # nearly every step of nearly every answer
            text = self._bytes.texts.get(ids[0]) or self._bytes.text(ids[0])
            if text is not None:
                return text
        text = self._utf8.decode(b"".join([self._bytes[token_id] for token_id in ids]))
        self._inside = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        token_of: Callable[[int], str | None],
        skipped: Collection[int],
        context: Sequence[int] = (),
    ) -> None:
        """Begin after `context`.

        Args:
            decode: ids to text, special tokens left out.
            token_of: a token by its id, None where there is none.
            skipped: special tokens and their like.
            context: tokens before the first; their text is not given out but decides, for example,
                whether the first word keeps the space before it.
        """
        self._decode = decode
        self._token_of = token_of
        self._skipped = skipped
        self._out = self._clean_context(context)
        self._out_text = decode(self._out) if self._out else ""
        self._pending: list[int] = []

    def _clean_context(self, context: Sequence[int]) -> list[int]:
        # A context that begins inside a run of byte tokens may cut a character in two.
        tail = [i for i in context[-_CONTEXT_TOKENS:] if i not in self._skipped]
        while tail and self._is_byte(tail[0]):
            del tail[0]
        return [] if _REPLACEMENT in self._decode(tail) else tail

    def push(self, ids: Sequence[int]) -> str:
        # Skipped tokens never enter the window: alone in it they would make the next word the first.
        self._pending += [
            i for i in ids if i not in self._skipped and self._token_of(i) is not None
        ]
        # One invalid byte turns its whole run of byte tokens into replacement characters, so a run
        # waits for its end.
        if not self._pending or self._is_byte(self._pending[-1]):
            return ""
        text = self._decode(self._out + self._pending)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._give_out(text)

    def flush(self) -> str:
        return self._give_out(self._decode(self._out + self._pending)) if self._pending else ""

    def _give_out(self, text: str) -> str:
        if text.startswith(self._out_text):
            new = text[len(self._out_text) :]
        else:
            # Bytes after a context that ends in bytes turned all of them invalid; what is out stays.
            new = self._decode(self._pending)
        self._out, self._pending = self._pending, []
        self._out_text = self._decode(self._out)
        return new

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._token_of(token_id) or "") is not None
