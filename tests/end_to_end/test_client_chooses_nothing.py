"""No field and no header of a request chooses an id, an address, a key or a worker of the KV plane."""

import asyncio

import httpx
import pytest
from http_stack import MODEL, http_stack

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_router.fleet.registry import WorkerRegistry

WISHES = {
    "sequence_id": 7,
    "request_id": "mine",
    "lease_id": "00" * 16,
    "epoch": 1,
    "generation": 1,
    "tag": 7,
    "ticket": "00" * 32,
    "transport_address": "inproc:mine",
    "prefill_worker": "prefill-9",
    "decode_worker": "decode-9",
    "kv_transfer_params": {"remote_block_ids": [0, 1, 99999], "remote_host": "10.0.0.1"},
    "data_parallel_rank": 3,
    "bootstrap_host": "10.0.0.1",
    "bootstrap_port": 1,
    "bootstrap_room": 42,
    "first_block": 3,
    "priority_blocks": [0, 1],
}
"""Ours, and what vLLM and SGLang let a request say."""
BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}],
    "max_tokens": 6,
    "temperature": 0,
}
HEADERS = {
    "x-sequence-id": "7",
    "x-prefiller-host-port": "10.0.0.1:1",
    "x-data-parallel-host-port": "10.0.0.1:1",
    "x-kvrelay-path": "local",
    "x-tenant": "somebody else's",
}


@pytest.fixture
def said(monkeypatch) -> list[pb.RouterMessage]:
    """What the router told its workers."""
    messages: list[pb.RouterMessage] = []
    send = WorkerRegistry.send

    def listening(self, name: str, message: pb.RouterMessage) -> None:
        messages.append(message)
        send(self, name, message)

    monkeypatch.setattr(WorkerRegistry, "send", listening)
    return messages


async def test_wishes_are_ignored_and_named(said):
    async with http_stack() as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        plain = await client.post("/v1/chat/completions", json=BODY)
        wished = await client.post("/v1/chat/completions", json=BODY | WISHES, headers=HEADERS)
        assert wished.status_code == 200
        assert wished.json()["choices"] == plain.json()["choices"]
        named = set(wished.headers["x-ignored-params"].split(", "))
        assert len(named & WISHES.keys()) > 5  # the header has a limit
        assert "x-ignored-params" not in plain.headers
    (first, second) = [
        m.submit_decode.sequence for m in said if m.WhichOneof("message") == "submit_decode"
    ]
    assert second.sequence_id not in (7, 42, first.sequence_id)
    assert second.cache_salt == first.cache_salt
    assert list(second.tokens) == list(first.tokens)
    leases = [m.open_transfer.lease for m in said if m.WhichOneof("message") == "open_transfer"]
    assert len(leases) == 2
    assert len({lease.lease_id for lease in leases}) == len({lease.tag for lease in leases}) == 2
    for lease in leases:
        assert lease.transport_address != b"inproc:mine"
        assert lease.ticket != bytes(32)
        assert lease.worker_name == "decode-0"


async def test_requests_under_one_id_are_several_requests(said):
    """What a client calls its requests is for its own logs."""
    async with http_stack() as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        ask = [
            client.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "the same"})
            for _ in range(6)
        ]
        answers = await asyncio.gather(*ask)
    assert {answer.status_code for answer in answers} == {200}
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1
    submits = [m.submit_decode for m in said if m.WhichOneof("message") == "submit_decode"]
    assert len({submit.sequence.sequence_id for submit in submits}) == 6
