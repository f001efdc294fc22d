"""Between the control protocol's messages and the engine's own types.

Ids of sequences are own ids (`ownership.py`) on this side, and their router's on the wire.
"""

from kvrelay_engine.runtime.ownership import own_id, wire_id
from kvrelay_engine.runtime.step_loop import LoadSnapshot
from kvrelay_engine.sequence import FinishReason, SequenceSpec
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import error_to_wire
from kvrelay_protocol.sampling import SamplingParams

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def spec_from_message(sequence: pb.Sequence, session: int) -> SequenceSpec:
    """A sequence that a session's router submitted, as the engine's own frozen type."""
    return SequenceSpec(
        sequence_id=own_id(session, sequence.sequence_id),
        request_id=sequence.request_id,
        tokens=tuple(sequence.tokens),
        output_offset=sequence.output_offset,
        max_tokens=sequence.max_tokens,
        stop_token_ids=frozenset(sequence.stop_token_ids),
        sampling=SamplingParams(
            temperature=sequence.sampling.temperature,
            top_k=sequence.sampling.top_k,
            top_p=sequence.sampling.top_p,
            min_p=sequence.sampling.min_p,
            seed=sequence.sampling.seed,
        ),
        deadline_s=sequence.deadline_seconds,
        traceparent=sequence.traceparent,
        cache_salt=sequence.cache_salt,
    )


def token_run(sequence_id: int, index: int, token: int, finish: FinishReason | None) -> pb.TokenRun:
    """One sampled token; `index` counts over all attempts of the request."""
    return pb.TokenRun(
        sequence_id=wire_id(sequence_id),
        first_index=index,
        tokens=[token],
        finish=_FINISH[finish],
    )


def step_message(runs: list[pb.TokenRun]) -> pb.WorkerMessage:
    return pb.WorkerMessage(step_output=pb.StepOutput(runs=runs))


def failure_message(sequence_id: int, error: BaseException) -> pb.WorkerMessage:
    """A sequence that ends in an error on this worker."""
    wire = error_to_wire(error)
    return pb.WorkerMessage(
        sequence_failed=pb.SequenceFailed(
            sequence_id=wire_id(sequence_id),
            error=pb.Error(code=wire.code, message=wire.message),
        ),
    )


def load_message(load: LoadSnapshot) -> pb.Load:
    """The scheduler's part of a load report; the worker adds what it measures itself."""
    return pb.Load(
        running=load.running,
        waiting=load.waiting,
        total_blocks=load.total_blocks,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        leased_blocks=load.leased_blocks,
        used_blocks=load.used_blocks,
        backlog_tokens=load.backlog_tokens,
        preemptions=load.preemptions,
        prefix_cache_queries=load.prefix_queries,
        prefix_cache_hits=load.prefix_hits,
    )
