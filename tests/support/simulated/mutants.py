"""Defects on purpose: what the machine of `test_ownership_machine.py` must be able to find."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import kvrelay_decode.receiver
import kvrelay_engine.sequence
import kvrelay_router.requests.service
import kvrelay_transfer.frames
from kvrelay_decode.receiver import KvReceiver
from kvrelay_decode.worker import DecodeWorker
from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.cache.hashing import root_hash
from kvrelay_prefill.sender import KvSender
from kvrelay_prefill.worker import PrefillWorker
from kvrelay_protocol.errors import CorruptFrame
from kvrelay_router.requests.machine import RequestMachine
from kvrelay_transfer.lease import Complete, ReceiveLease, ReceiveState, SendLease

Mutant = Callable[[pytest.MonkeyPatch], None]


def accepts_whatever_frame_comes(patch: pytest.MonkeyPatch) -> None:
    """Neither lease, epoch, generation nor key are looked at."""
    patch.setattr(kvrelay_transfer.frames, "_check_current", lambda *_: None)
    patch.setattr(kvrelay_transfer.frames, "compare_digest", lambda *_: True)


def accepts_any_key(patch: pytest.MonkeyPatch) -> None:
    """The right names are enough."""
    patch.setattr(kvrelay_transfer.frames, "compare_digest", lambda *_: True)


def believes_damaged_blocks(patch: pytest.MonkeyPatch) -> None:
    """The digest taken by the copy is not compared."""
    write = KvReceiver._write

    def careless(self: KvReceiver, frame: Any) -> None:
        with contextlib.suppress(CorruptFrame):
            write(self, frame)

    patch.setattr(KvReceiver, "_write", careless)


def starts_when_the_record_comes(patch: pytest.MonkeyPatch) -> None:
    """Nobody counts what came before it."""

    def handover(self: ReceiveLease, total: int) -> Complete:
        self.state = ReceiveState.READY
        return Complete()

    patch.setattr(ReceiveLease, "handover", handover)


def counts_messages_not_tokens(patch: pytest.MonkeyPatch) -> None:
    """And the sender leaves out what was computed while another message was being sent."""
    ready, handover = SendLease.ready, ReceiveLease.handover

    def forgetful(self: SendLease, piece: Any) -> None:
        if not self._ready:
            ready(self, piece)

    def count(self: ReceiveLease, total: int) -> Any:
        self.owed = sum(piece.size for piece in self._received.values())
        return handover(self, total)

    patch.setattr(SendLease, "ready", forgetful)
    patch.setattr(ReceiveLease, "handover", count)


def writes_repeats_again(patch: pytest.MonkeyPatch) -> None:
    """A second copy of a message overwrites the first, damaged or not."""
    patch.setattr(ReceiveLease, "has", lambda self, number: False)
    patch.setattr(ReceiveLease, "overlaps", lambda self, piece: False)


def frees_the_source_at_the_first_token(patch: pytest.MonkeyPatch) -> None:
    """What has still to be sent belongs to nobody."""
    first_token = PrefillWorker._first_token

    def hasty(self: PrefillWorker, event: Any) -> Any:
        runs = first_token(self, event)
        self.host.post(lambda: self.scheduler.release(event.sequence_id))
        return runs

    patch.setattr(PrefillWorker, "_first_token", hasty)


def frees_the_lease_with_the_cancel(patch: pytest.MonkeyPatch) -> None:
    """The cancel of a receive is not waited for."""
    cancel = DecodeWorker._cancel

    def hasty(self: DecodeWorker, sequence_id: int, reason: str) -> None:
        cancel(self, sequence_id, reason)
        self.host.post(lambda: self.scheduler.abort(sequence_id))

    patch.setattr(DecodeWorker, "_cancel", hasty)


def does_not_confirm_cancels(patch: pytest.MonkeyPatch) -> None:
    """The receiver lets go of its staging buffer while somebody writes to it."""

    async def at_once(work: Any) -> None:
        asyncio.ensure_future(work).add_done_callback(lambda f: f.cancelled() or f.exception())

    patch.setattr(kvrelay_decode.receiver, "to_the_end", at_once)


def forgets_to_cancel(side: str) -> Mutant:
    """An attempt that ends leaves one of its workers alone."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        close = RequestMachine._close

        def forgetful(self: RequestMachine, reason: str) -> Any:
            worker = getattr(self._run.path, f"{side}_worker") if self._run else None
            return [cancel for cancel in close(self, reason) if cancel.worker != worker]

        patch.setattr(RequestMachine, "_close", forgetful)

    mutate.__name__ = f"forgets_to_cancel_the_{side}_worker"
    return mutate


def never_expires(patch: pytest.MonkeyPatch) -> None:
    """Neither side gives up on the other."""

    async def receive_patiently(self: KvReceiver, receive: Any) -> int:
        return await receive.wait()

    async def send_patiently(self: KvSender) -> None:
        await self._changed.wait()
        self._changed.clear()

    patch.setattr(KvReceiver, "_next_message", receive_patiently)
    patch.setattr(KvSender, "_wait", send_patiently)


def shares_prefixes_of_all_tenants(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kvrelay_engine.sequence, "root_hash", lambda model, salt: root_hash(model, b""))


def takes_leased_blocks(patch: pytest.MonkeyPatch) -> None:
    """An exhausted pool hands out a block that was promised to a transfer."""
    release = BlockAllocator.release

    def wrong(self: BlockAllocator, blocks: Any) -> None:
        release(self, blocks)
        leased = [
            b for b, r in enumerate(self._references) if r and self._state[b].name == "LEASED"
        ]
        if leased and not self._free:
            self._free.append(leased[0])

    patch.setattr(BlockAllocator, "release", wrong)


def forgets_a_token_in_replays(patch: pytest.MonkeyPatch) -> None:
    """The workers of a replay are told all tokens that the client has but the last."""
    sequence_of = kvrelay_router.requests.service.sequence_of

    def wrong(attempt: Any, *args: Any) -> Any:
        if attempt.output_offset:
            attempt = replace(attempt, tokens=attempt.tokens[:-1])
        return sequence_of(attempt, *args)

    patch.setattr(kvrelay_router.requests.service, "sequence_of", wrong)


forgets_the_prefill_worker = forgets_to_cancel("prefill")
forgets_the_decode_worker = forgets_to_cancel("decode")

MUTANTS: tuple[Mutant, ...] = (
    accepts_whatever_frame_comes,
    accepts_any_key,
    believes_damaged_blocks,
    starts_when_the_record_comes,
    counts_messages_not_tokens,
    writes_repeats_again,
    frees_the_source_at_the_first_token,
    frees_the_lease_with_the_cancel,
    does_not_confirm_cancels,
    forgets_the_prefill_worker,
    forgets_the_decode_worker,
    never_expires,
    shares_prefixes_of_all_tenants,
    takes_leased_blocks,
    forgets_a_token_in_replays,
)
USUAL: tuple[Mutant, ...] = (
    accepts_any_key,
    starts_when_the_record_comes,
    counts_messages_not_tokens,
    frees_the_source_at_the_first_token,
    does_not_confirm_cancels,
    forgets_the_prefill_worker,
    forgets_a_token_in_replays,
)
"""Those of every run; the others take longer to find, or are much like one of these."""
