"""One round: streams run alone for a while, then long prompts arrive among them."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvrelay_bench.serve.client import Answer, CompletionClient, Outcome
from kvrelay_bench.serve.load import Sample
from kvrelay_bench.serve.stack import Target
from kvrelay_bench.serve.workload import PlannedRequest, Prompts, completion_body
from kvrelay_protocol.errors import ServiceError, UsageError

_LONG_NUMBER = 1_000_000
_WARM_NUMBER = 2_000_000
_POLL_S = 0.02
_FEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What every round does, whichever stack it runs on."""

    streams: int
    stream_input: int
    """Tokens of a stream's prompt."""
    quiet_s: float
    """The streams alone."""
    arrivals: int
    """Long prompts of a round."""
    every_s: float
    """Pause between them; what is not done by then is waited for."""
    long_input: int
    long_output: int
    seed: int = 0
    timeout_s: float = 300.0


@dataclass(slots=True)
class Round:
    """What happened. Times are those of `time.perf_counter`."""

    streams: list[Answer]
    quiet_from: float = 0.0
    busy_from: float = 0.0
    """The first long prompt is sent; the quiet window ends."""
    busy_until: float = 0.0
    """At least `arrivals * every_s` later, and every long prompt is answered."""
    long: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_context(plan: Plan, target: Target) -> None:
    """Refuse lengths the server can't hold.

    Raises:
        UsageError: names both.
    """
    needed = plan.long_input + plan.long_output
    if target.max_context is not None and needed > target.max_context:
        raise UsageError(
            f"--long-input {plan.long_input} and --long-output {plan.long_output} need a context of "
            f"{needed}; this model has {target.max_context}"
        )


async def warm_up(target: Target, plan: Plan) -> None:
    """Every code path once: a few streams beside one long prompt.

    Raises:
        ServiceError: the server did not answer.
    """
    prompts = Prompts(target.vocabulary, seed=plan.seed)
    lengths = [plan.long_input, *[plan.stream_input] * plan.streams]
    async with _client(target, plan) as client:
        answers = await asyncio.gather(
            *(
                client.complete(
                    completion_body(
                        target.model,
                        prompts.tokens(PlannedRequest(_WARM_NUMBER + i, 0.0, length, 1)),
                        _FEW_TOKENS,
                        salt="warm",
                    )
                )
                for i, length in enumerate(lengths)
            )
        )
    for answer in answers:
        if answer.outcome is not Outcome.OK:
            raise ServiceError(f"{target.base_url} does not answer: {answer.problem}")


async def run_round(target: Target, plan: Plan, number: int) -> Round:
    """Run one round; the streams are cancelled at its end.

    Raises:
        ServiceError: a stream never began.
    """
    prompts = Prompts(target.vocabulary, seed=plan.seed)
    salt = secrets.token_hex(8)
    longest = (target.max_context or plan.long_input) - plan.stream_input

    def body(request: PlannedRequest) -> bytes:
        # Tokens are counted in every chunk: a cancelled stream has no count at its end.
        tokens = prompts.tokens(request)
        return completion_body(
            target.model, tokens, request.output_tokens, salt=salt, count_tokens=True
        )

    result = Round([Answer() for _ in range(plan.streams)])
    first = number * plan.streams
    async with _client(target, plan) as client:
        streams = [
            asyncio.create_task(
                client.complete(
                    body(PlannedRequest(first + i, 0.0, plan.stream_input, longest)), answer
                )
            )
            for i, answer in enumerate(result.streams)
        ]
        try:
            await _all_running(result.streams, plan.timeout_s)
            result.quiet_from = time.perf_counter()
            await asyncio.sleep(plan.quiet_s)
            await _send_long(client, body, plan, number, result)
            result.busy_until = time.perf_counter()
            result.problems = _problems(result)
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    return result


@asynccontextmanager
async def _client(target: Target, plan: Plan) -> AsyncIterator[CompletionClient]:
    client = CompletionClient(target.base_url, timeout_s=plan.timeout_s)
    try:
        yield client
    finally:
        client.close()


async def _all_running(streams: list[Answer], timeout_s: float) -> None:
    deadline = time.perf_counter() + timeout_s
    while not all(len(answer.chunks) >= _FEW_TOKENS for answer in streams):
        ended = next((answer for answer in streams if answer.ended), None)
        if ended is not None:
            raise ServiceError(f"a stream ended before the round began: {ended.problem or 'done'}")
        if time.perf_counter() > deadline:
            raise ServiceError(f"the streams did not all begin within {timeout_s:g} s")
        await asyncio.sleep(_POLL_S)


async def _send_long(
    client: CompletionClient,
    body: Callable[[PlannedRequest], bytes],
    plan: Plan,
    number: int,
    result: Round,
) -> None:
    """Long prompts at fixed times, then wait for their answers and for the end of the window."""
    requests = [
        PlannedRequest(
            _LONG_NUMBER + number * plan.arrivals + i,
            i * plan.every_s,
            plan.long_input,
            plan.long_output,
        )
        for i in range(plan.arrivals)
    ]
    bodies = [body(request) for request in requests]
    result.busy_from = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request, encoded in zip(requests, bodies, strict=True):
            due = result.busy_from + request.arrival_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            answer = Answer()
            result.long.append(Sample(request, due, answer))
            group.create_task(client.complete(encoded, answer))
        end = result.busy_from + plan.arrivals * plan.every_s
        await asyncio.sleep(max(0.0, end - time.perf_counter()))


def _problems(result: Round) -> list[str]:
    found = [f"a stream ended in the middle of the round: {answer.problem or answer.outcome}"
             for answer in result.streams if answer.ended]  # fmt: skip
    found += [f"a long prompt failed: {sample.answer.problem}"
              for sample in result.long if sample.answer.outcome is not Outcome.OK]  # fmt: skip
    return found
