"""The load client's process: raw HTTP over kept connections, as little work per chunk as possible.

It stamps when a request was due, when it left and when each piece of an answer came, keeps the bytes,
and looks at them only afterwards. Reads one JSON object from its arguments and writes another one to
the file named there.
"""

import asyncio
import gc
import json
import re
import sys
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from kvrelay_bench.router.loop import run
from kvrelay_bench.router.workload import Workload, answer_ids
from kvrelay_router.text.tokenizer import Tokenizer, load_tokenizer

_LAST_CHUNK = b"0\r\n\r\n"
_TOKEN = re.compile(rb'"content":"[^"]')  # not the empty text that opens an answer
_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Exchange:
    """One request and what came back. Times are nanoseconds of the monotonic clock."""

    request: int
    due: int = 0
    sent: int = 0
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    error: str = ""


class _Connection(asyncio.Protocol):
    """One kept connection; carries one exchange at a time."""

    def __init__(self, client: "LoadClient") -> None:
        self._client = client
        self.exchange: Exchange | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, exchange: Exchange, raw: bytes) -> None:
        assert self.transport is not None
        self.exchange = exchange
        exchange.sent = time.monotonic_ns()
        self.transport.write(raw)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        exchange.pieces.append((time.monotonic_ns(), data))
        self._client.received(exchange)
        if data.endswith(_LAST_CHUNK):
            self.exchange = None
            self._client.done(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost(self)
        if self.exchange is not None:
            self.exchange.error = f"connection lost: {exc!r}"
            self.exchange = None
            self._client.done(None)


class LoadClient:
    """Sends every request of a workload when it is due, whatever became of those before it."""

    def __init__(self, workload: Workload, host: str, port: int, model: str, router: int) -> None:
        self.exchanges = [Exchange(number) for number in range(workload.requests)]
        self.marks: dict[str, tuple[int, float, float]] = {}
        """Name to (time, CPU seconds of the router, CPU seconds of this process)."""
        self._workload = workload
        self._address = (host, port)
        self._model = model
        # CPU clock of another process, all its threads: what clock_getcpuclockid(3) gives on Linux.
        self._router_clock = ~router << 3 | 2
        self._idle: list[_Connection] = []
        self._left = workload.requests
        self._unanswered = workload.requests
        self._over = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        raw = [self._raw(number) for number in range(self._workload.requests)]
        if not self._workload.rate:
            for _ in raw:
                self._idle.append(await self._connect())
        gc.collect()
        gc.freeze()
        begin = loop.time() + 0.05
        for exchange, at, body in zip(self.exchanges, self._workload.arrivals(), raw, strict=True):
            wait = begin + at - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            exchange.due = int((begin + at) * 1e9)
            if exchange.request == self._workload.warmup:
                self.mark("begin")
            connection = self._idle.pop() if self._idle else await self._connect()
            connection.send(exchange, body)
        try:
            await asyncio.wait_for(self._over.wait(), _TIMEOUT_S)
        except TimeoutError:
            for exchange in self.exchanges:
                exchange.error = exchange.error or "no end within the time limit"
        self.mark("end")

    def received(self, exchange: Exchange) -> None:
        if len(exchange.pieces) == 2:  # the head is the first, the first token the second
            self._unanswered -= 1
            if self._unanswered == 0:
                self.mark("streaming")

    def done(self, connection: _Connection | None) -> None:
        if connection is not None:
            self._idle.append(connection)
        if self._left == self._workload.requests:
            self.mark("first end")
        self._left -= 1
        if self._left == 0:
            self._over.set()

    def lost(self, connection: _Connection) -> None:
        """Servers close connections that stay idle."""
        if connection in self._idle:
            self._idle.remove(connection)

    def mark(self, name: str) -> None:
        used = time.clock_gettime(self._router_clock)
        self.marks[name] = (time.monotonic_ns(), used, time.process_time())

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), *self._address)
        return connection

    def _raw(self, number: int) -> bytes:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._workload.prompt(number)}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self._workload.tokens,
            "ignore_eos": True,
            "seed": number,
        }
        raw = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\naccept: */*\r\n"
            f"content-type: application/json\r\nauthorization: Bearer sk-bench\r\n"
            f"x-kvrelay-force-path: {self._workload.path}\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        return head.encode() + raw


def check(
    exchange: Exchange, workload: Workload, table: list[int], tokenizer: Tokenizer
) -> list[int]:
    """Compare an answer with the tokens it must have; sets `error` where it differs.

    Returns:
        How many tokens each event with text carries; together exactly the request's, else nothing.
    """
    raw = b"".join(piece for _, piece in exchange.pieces)
    head, _, rest = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        exchange.error = exchange.error or head.partition(b"\r\n")[0].decode() or "no answer"
        return []
    try:
        texts, usage = _parse(_unchunk(rest))
    except ValueError as error:
        exchange.error = exchange.error or f"not the stream it should be: {error}"
        return []
    # Tokens of the table are whole texts by themselves, so the ends of tokens can be told.
    ids = answer_ids(table, exchange.request, workload.tokens)
    ends = list(accumulate(len(tokenizer.decode([token_id])) for token_id in ids))
    seen = [bisect_right(ends, length) for length in accumulate(map(len, texts))]
    if "".join(texts) != tokenizer.decode(ids):
        exchange.error = "another text than its tokens"
        return []
    if usage != workload.tokens:
        exchange.error = f"usage of {usage} tokens, not {workload.tokens}"
    return [after - before for before, after in pairwise([0, *seen])]


def _unchunk(raw: bytes) -> bytes:
    body: list[bytes] = []
    at = 0
    while True:
        end = raw.index(b"\r\n", at)
        size = int(raw[at:end], 16)
        if size == 0:
            return b"".join(body)
        body.append(raw[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def _parse(body: bytes) -> tuple[list[str], int | None]:
    texts: list[str] = []
    usage: int | None = None
    events = body.decode().split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        raise ValueError("it does not end in [DONE]")
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        if "error" in chunk:
            raise ValueError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            texts += filter(None, [choice["delta"].get("content")])
        if chunk.get("usage"):
            usage = chunk["usage"]["completion_tokens"]
    return texts, usage


def arrivals_of_tokens(exchange: Exchange, carried: list[int]) -> list[int]:
    """When each token of an answer was here, by how many each event carried."""
    ends = list(accumulate(len(piece) for _, piece in exchange.pieces))
    raw = b"".join(piece for _, piece in exchange.pieces)
    times = [exchange.pieces[bisect_left(ends, found.end())][0] for found in _TOKEN.finditer(raw)]
    return [at for at, count in zip(times, carried, strict=False) for _ in range(count)]


def main(given: dict[str, Any]) -> None:
    workload = Workload(**given["workload"])
    client = LoadClient(workload, given["host"], given["port"], given["model"], given["router"])
    run(client.run())
    tokenizer = load_tokenizer(Path(given["tokenizer"]))
    rows = []
    for exchange in client.exchanges:
        carried = check(exchange, workload, given["table"], tokenizer)
        rows.append(
            {
                "request": exchange.request,
                "due": exchange.due,
                "sent": exchange.sent,
                "arrived": arrivals_of_tokens(exchange, carried),
                "events": len(carried),
                "error": exchange.error,
            }
        )
    Path(given["result"]).write_text(json.dumps({"exchanges": rows, "marks": client.marks}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
