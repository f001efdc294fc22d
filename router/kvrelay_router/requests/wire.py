"""Between the machine's events and actions and the messages of the Join stream."""

from collections.abc import Sequence

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import WireError, error_from_wire
from kvrelay_router.requests import actions, events
from kvrelay_router.requests.types import FinishReason, ValidRequest

FINISH: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def tokens_event(at: float, worker: str, run: pb.TokenRun) -> events.TokensArrived:
    return events.TokensArrived(
        at,
        run.sequence_id,
        worker,
        run.first_index,
        tuple(run.tokens),
        FINISH.get(run.finish),
    )


def worker_event(at: float, worker: str, message: pb.WorkerMessage) -> events.WorkerEvent | None:
    """The event in a message about one sequence; None for messages about anything else."""
    match message.WhichOneof("message"):
        case "sequence_started":
            started = message.sequence_started
            return events.SequenceStarted(
                at,
                started.sequence_id,
                worker,
                started.cached_tokens,
                started.queue_seconds,
            )
        case "sequence_failed":
            failed = message.sequence_failed
            error = error_from_wire(WireError(failed.error.code, failed.error.message))
            return events.SequenceFailed(at, failed.sequence_id, worker, error)
        case "lease_granted":
            granted = message.lease_granted
            return events.LeaseGranted(at, granted.sequence_id, worker, granted.lease)
        case "kv_sent":
            sent = message.kv_sent
            return events.KvSent(
                at,
                sent.sequence_id,
                worker,
                sent.bytes,
                sent.seconds,
                sent.prefill_seconds,
                sent.transport,
            )
        case "kv_received":
            received = message.kv_received
            return events.KvReceived(
                at,
                received.sequence_id,
                worker,
                received.bytes,
                received.seconds,
                received.exposed_seconds,
                received.transport,
            )
        case "kv_missing":
            missing = message.kv_missing
            return events.KvMissing(at, missing.sequence_id, worker, tuple(missing.messages))
        case _:
            return None


def submit_message(
    action: actions.SubmitDecode | actions.SubmitPrefill, sequence: pb.Sequence, *, lease_s: float
) -> pb.RouterMessage:
    """The message that dispatches an attempt; both its workers get the same sequence."""
    match action:
        case actions.SubmitDecode(expect_kv=expect_kv):
            submit = pb.SubmitDecode(sequence=sequence, expect_kv=expect_kv, lease_seconds=lease_s)
            return pb.RouterMessage(submit_decode=submit)
        case actions.SubmitPrefill():
            return pb.RouterMessage(submit_prefill=pb.SubmitPrefill(sequence=sequence))


def pulse_message(live: Sequence[int], stalled: Sequence[int]) -> pb.RouterMessage:
    """The answer to a heartbeat."""
    return pb.RouterMessage(pulse=pb.Pulse(live=live, stalled=stalled))


def router_message(action: actions.FollowUp) -> pb.RouterMessage:
    """The message that carries out any other action for a worker."""
    match action:
        case actions.OpenTransfer(_, sequence_id, lease):
            opened = pb.OpenTransfer(sequence_id=sequence_id, lease=lease)
            return pb.RouterMessage(open_transfer=opened)
        case actions.ResendKv(_, sequence_id, messages):
            resend = pb.ResendKv(sequence_id=sequence_id, messages=messages)
            return pb.RouterMessage(resend_kv=resend)
        case actions.AllSent(_, sequence_id):
            return pb.RouterMessage(all_sent=pb.AllSent(sequence_id=sequence_id))
        case actions.ReleaseKv(_, sequence_id):
            return pb.RouterMessage(release_kv=pb.ReleaseKv(sequence_id=sequence_id))
        case actions.Cancel(_, sequence_id, reason):
            cancel = pb.Cancel(sequence_id=sequence_id, reason=reason)
            return pb.RouterMessage(cancel=cancel)


def sequence_of(attempt: actions.Attempt, request: ValidRequest, traceparent: str) -> pb.Sequence:
    """What workers are told of an attempt."""
    sampling = request.sampling
    return pb.Sequence(
        sequence_id=attempt.sequence_id,
        request_id=request.request_id,
        tokens=attempt.tokens,
        output_offset=attempt.output_offset,
        max_tokens=attempt.max_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        sampling=pb.Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
        ),
        deadline_seconds=attempt.deadline_s,
        traceparent=traceparent,
        cache_salt=request.cache_salt,
    )
