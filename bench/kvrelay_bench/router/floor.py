"""The floor of the router benchmark: the router's libraries without the router.

The same uvicorn on httptools and uvloop takes the same requests, the same grpc.aio carries the same
messages to the same mock workers, and every token leaves as a server-sent event of the same size. What
lies between is a dictionary: one sequence id to one connection. There is no validation, template or
tokenizer, no placement, no state machine, no deadline, no metric and no trace. What `latency` shows
above this is what the router itself adds.

Reads one JSON object from its arguments and runs until its standard input ends.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import grpc.aio
import uvicorn
from starlette.types import Receive, Scope, Send

from kvrelay_bench.router.loop import run
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc
from kvrelay_protocol.outgoing import Outgoing, each
from kvrelay_router.fleet.servicer import SERVER_OPTIONS
from kvrelay_router.fleet.worker_link import OUTGOING_LIMIT
from kvrelay_router.main import settle_memory

_PROMPT = range(48)
"""Tokens in each submission: about as many as the workload's prompts have."""


class Floor(fleet_pb2_grpc.FleetServicer):
    """Both ends: an ASGI app, and the Join calls of one prefill and one decode worker."""

    def __init__(self, texts: dict[int, str], model: str) -> None:
        """Args: `texts` of the tokens that will come."""
        base = {"id": "chatcmpl-" + 24 * "0", "created": 0, "model": model,
                "object": "chat.completion.chunk"}  # fmt: skip
        self._frames = {token: _frame(base, _delta(text)) for token, text in texts.items()}
        self._base = base
        self._lines: dict[int, Outgoing[pb.RouterMessage]] = {}
        self._answers: dict[int, asyncio.Queue[pb.TokenRun]] = {}
        self._ids: Iterator[int] = count(1)

    # ---- to the workers

    async def Join(self, requests: AsyncIterator[pb.WorkerMessage], context: Any) -> None:  # noqa: N802 - the name in fleet.proto
        hello = (await anext(requests)).hello
        line = self._lines[hello.role] = Outgoing(pb.RouterMessage, OUTGOING_LIMIT)
        writer = asyncio.create_task(_write(line, context))
        try:
            async for message in requests:
                each(message, self._received)
        finally:
            writer.cancel()
            del self._lines[hello.role]

    def _received(self, message: pb.WorkerMessage) -> None:
        if message.HasField("lease_granted"):
            opened = pb.OpenTransfer(sequence_id=message.lease_granted.sequence_id)
            self._lines[pb.ROLE_PREFILL].put(pb.RouterMessage(open_transfer=opened))
        for token_run in message.step_output.runs:
            self._answers[token_run.sequence_id].put_nowait(token_run)

    def _submit(self, body: dict[str, Any]) -> int:
        sequence = pb.Sequence(
            sequence_id=next(self._ids),
            tokens=_PROMPT,
            max_tokens=body["max_tokens"],
            sampling=pb.Sampling(seed=body["seed"]),
        )
        prefill = pb.SubmitPrefill(sequence=sequence)
        self._lines[pb.ROLE_PREFILL].put(pb.RouterMessage(submit_prefill=prefill))
        decode = pb.SubmitDecode(sequence=sequence, expect_kv=True)
        self._lines[pb.ROLE_DECODE].put(pb.RouterMessage(submit_decode=decode))
        return sequence.sequence_id

    # ---- to the clients

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            await _head(send, b"application/json")
            workers = [pb.Role.Name(role) for role in self._lines]
            body = json.dumps({"workers": workers}).encode()
            await send({"type": "http.response.body", "body": body})
            return
        sequence_id = self._submit(json.loads(await _body(receive)))
        answer = self._answers[sequence_id] = asyncio.Queue()
        await _head(send, b"text/event-stream; charset=utf-8")
        early: dict[int, pb.TokenRun] = {}
        tokens, over = 0, False
        while not over:
            token_run = await answer.get()
            early[token_run.first_index] = token_run
            # Two workers, two streams: the second token may overtake the first.
            while due := early.pop(tokens, None):
                tokens, over = tokens + 1, bool(due.finish)
                frame = self._frames[due.tokens[0]]
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        del self._answers[sequence_id]
        await send({"type": "http.response.body", "body": self._end(tokens)})

    def _end(self, tokens: int) -> bytes:
        usage = {"prompt_tokens": len(_PROMPT), "completion_tokens": tokens}
        last = _frame(self._base, {"choices": [], "usage": usage})
        return last + b"data: [DONE]\n\n"


def _delta(text: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return {"choices": [choice], "usage": None}


def _frame(base: dict[str, Any], rest: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({**base, **rest}, separators=(',', ':'))}\n\n".encode()


async def _write(line: Outgoing[pb.RouterMessage], context: Any) -> None:
    while (message := await line.next()) is not None:
        await context.write(message)


async def _body(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    while True:
        message = await receive()
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


async def _head(send: Send, content_type: bytes) -> None:
    headers = [(b"content-type", content_type)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _serve(given: dict[str, Any]) -> None:
    texts = {int(token): text for token, text in given["texts"].items()}
    floor = Floor(texts, given["model"])
    workers = grpc.aio.server(options=SERVER_OPTIONS)
    fleet_pb2_grpc.add_FleetServicer_to_server(floor, workers)
    workers.add_insecure_port(f"{given['host']}:{given['join_port']}")
    await workers.start()
    settings = uvicorn.Config(
        floor,
        host=given["host"],
        port=given["port"],
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = uvicorn.Server(settings)
    settle_memory()
    serving = asyncio.create_task(server.serve())
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving
    await workers.stop(0)


if __name__ == "__main__":
    run(_serve(json.loads(sys.argv[1])))
