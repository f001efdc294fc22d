"""What a worker that starts and one that runs say to each other about weights.

```
 reader                                             server
   │ REQUEST(number, file, start, bytes, two tags) ────► on the offer's tag, one after the other
   │ ◄───────────────────────────── ANSWER(yes, or why not) on the request's answer tag
   │ ◄═══════════════ messages of the size asked for, and a rest, on its data tag
```

Requests and answers end in a BLAKE2b-128 under a key of the offer's ticket. The data has none: its reader
holds it against the sha256 of the manifest, which says more.
"""

import enum
import hashlib
import struct
from dataclasses import dataclass
from hmac import compare_digest
from typing import Self

from kvrelay_protocol.errors import WeightsRefused
from kvrelay_transfer.digest import DIGEST_SIZE, mac
from kvrelay_transfer.ticket import TICKET_SIZE

MESSAGE_BYTES = 4 * 1024 * 1024
"""The largest message of data, as large as one of KV: what KV may have to wait for, and what a lost peer
costs twice."""
MAX_REQUEST_BYTES = 2048
MAX_ANSWER_BYTES = 512
MAX_RANGE_BYTES = 1 << 40
_REQUEST = struct.Struct("<4sHHIQQQQQ16s")
_ANSWER = struct.Struct("<4sHHQ")
_REQUEST_MAGIC, _ANSWER_MAGIC = b"KVWQ", b"KVWA"
_VERSION = 1
_PURPOSE = b"kvrelay weights1"


class Verdict(enum.IntEnum):
    """What a server says to a request."""

    YES = 0
    MALFORMED = 1
    WRONG_TICKET = 2
    EXPIRED = 3
    REPEATED = 4
    OTHER_WEIGHTS = 5
    NOT_HERE = 6
    """It has the weights, but not these bytes of them: the next range may be there."""


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes `start` to `start + nbytes` of a weight file."""

    number: int
    """Of the reader's requests, counted from 1."""
    file: str
    start: int
    nbytes: int
    answer_tag: int
    data_tag: int
    weights_id: str
    message_bytes: int = MESSAGE_BYTES
    """Of every message but the last."""

    def pack(self, key: bytes) -> bytes:
        name = self.file.encode()
        head = _REQUEST.pack(
            _REQUEST_MAGIC,
            _VERSION,
            len(name),
            self.message_bytes,
            self.number,
            self.start,
            self.nbytes,
            self.answer_tag,
            self.data_tag,
            identity_digest(self.weights_id),
        )
        return head + name + mac(key, head + name)


@dataclass(frozen=True, slots=True)
class OpenedRequest:
    """A request that a holder of the ticket made."""

    number: int
    file: str
    start: int
    nbytes: int
    answer_tag: int
    data_tag: int
    identity: bytes
    message_bytes: int

    @classmethod
    def unpack(cls, content: bytes, key: bytes) -> Self | Verdict:
        """The request, or why it is none."""
        if not _REQUEST.size + DIGEST_SIZE <= len(content) <= MAX_REQUEST_BYTES:
            return Verdict.MALFORMED
        magic, version, name_size, message_bytes, number, start, nbytes, *tags, identity = (
            _REQUEST.unpack_from(content)
        )
        name = content[_REQUEST.size : -DIGEST_SIZE]
        if magic != _REQUEST_MAGIC or version != _VERSION or len(name) != name_size:
            return Verdict.MALFORMED
        if not compare_digest(mac(key, content[:-DIGEST_SIZE]), content[-DIGEST_SIZE:]):
            return Verdict.WRONG_TICKET
        if not (0 < nbytes <= MAX_RANGE_BYTES and 0 < message_bytes <= MESSAGE_BYTES):
            return Verdict.MALFORMED
        file = name.decode(errors="replace")
        return cls(number, file, start, nbytes, tags[0], tags[1], identity, message_bytes)


def answer_tag_of(content: bytes) -> int | None:
    """Where the maker of this request waits for an answer, if it is whole enough to say so."""
    return _REQUEST.unpack_from(content)[7] if len(content) >= _REQUEST.size else None


def pack_answer(number: int, verdict: Verdict, key: bytes) -> bytes:
    head = _ANSWER.pack(_ANSWER_MAGIC, _VERSION, verdict, number)
    return head + mac(key, head)


def unpack_answer(content: bytes, number: int, key: bytes) -> Verdict:
    """What the server says to request `number`.

    Raises:
        WeightsRefused: it is no answer to it.
    """
    if len(content) == _ANSWER.size + DIGEST_SIZE:
        magic, version, verdict, said = _ANSWER.unpack_from(content)
        sealed = compare_digest(mac(key, content[: _ANSWER.size]), content[_ANSWER.size :])
        known = magic == _ANSWER_MAGIC and version == _VERSION and verdict in tuple(Verdict)
        if known and (sealed or verdict == Verdict.WRONG_TICKET) and said in {number, 0}:
            return Verdict(verdict)
    raise WeightsRefused("an answer that nobody with this ticket gave")


def weights_key(ticket: bytes) -> bytes:
    """32 bytes that seal the requests and answers of one offer.

    Raises:
        WeightsRefused: it is no ticket.
    """
    if len(ticket) != TICKET_SIZE:
        raise WeightsRefused(f"a ticket of {len(ticket)} bytes; it needs {TICKET_SIZE}")
    return hashlib.blake2b(key=ticket, digest_size=32, person=_PURPOSE).digest()


def identity_digest(weights_id: str) -> bytes:
    """16 bytes for the name of a checkpoint's bytes, whatever its length."""
    return hashlib.blake2b(weights_id.encode(), digest_size=16).digest()
