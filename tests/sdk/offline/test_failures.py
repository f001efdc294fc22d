"""What ends early: interrupts, exceptions, and single requests that the engine gives up."""

import dataclasses
import logging
import signal
import threading

import pytest
from tiny_models import clear_case, random_prompt, tiny_model

from kvrelay import SamplingParams
from kvrelay_engine.batch import StepResult
from kvrelay_protocol.errors import InternalError

from .conftest import check_idle

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def on_step(llm, monkeypatch):
    """Calls a function with (number, batch) around each step; what it returns is the result."""
    real = llm._engine.runner.step

    def install(act):
        count = iter(range(10_000))
        monkeypatch.setattr(llm._engine.runner, "step", lambda batch: act(next(count), batch, real))

    yield install
    monkeypatch.setattr(llm._engine.runner, "step", real)


def still_answers(llm):
    prompt, answer = clear_case(tiny_model("qwen3"), 40, 24)
    (output,) = llm.generate(list(prompt), GREEDY)
    assert output.outputs[0].token_ids == list(answer)
    check_idle(llm)


def test_ctrl_c_ends_the_call_between_two_steps_and_gives_all_blocks_back(llm, on_step):
    steps = []

    def act(number, batch, real):
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        result = real(batch)
        steps.append(number)
        return result

    on_step(act)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([random_prompt(40, seed=n) for n in range(6)], GREEDY)
    assert steps == [0, 1, 2, 3], "the step that was interrupted was finished"
    assert signal.getsignal(signal.SIGINT) is handler
    check_idle(llm)
    on_step(lambda number, batch, real: real(batch))
    still_answers(llm)


def test_a_second_ctrl_c_does_not_wait(llm, on_step):
    def act(number, batch, real):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    on_step(act)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([random_prompt(40, seed=n) for n in range(3)], GREEDY)
    check_idle(llm)
    on_step(lambda number, batch, real: real(batch))
    still_answers(llm)


def test_an_exception_in_a_step_is_the_callers_and_the_engine_goes_on(llm, on_step):
    def act(number, batch, real):
        if number == 2:
            raise MemoryError("no more")
        return real(batch)

    on_step(act)
    with pytest.raises(MemoryError, match="no more"):
        llm.generate([random_prompt(40, seed=n) for n in range(3)], GREEDY)
    check_idle(llm)
    on_step(lambda number, batch, real: real(batch))
    still_answers(llm)


def test_a_scheduler_left_half_way_through_a_change_is_replaced(llm, monkeypatch):
    scheduler = llm._engine.scheduler

    def broken(batch, result):
        scheduler._running.popitem()  # its blocks are nobody's now
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "commit", broken)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([random_prompt(40, seed=n) for n in range(3)], GREEDY)
    assert llm._engine.scheduler is not scheduler
    still_answers(llm)


def test_a_request_that_fails_leaves_the_others_their_answers(llm, on_step, caplog):
    prompts = [clear_case(tiny_model("qwen3"), length, 24) for length in (20, 33, 40)]

    def act(number, batch, real):
        result = real(batch)
        victim = batch.slices[0].sequence_id
        if number != 5:
            return result
        tokens = {i: token for i, token in result.tokens.items() if i != victim}
        return StepResult(tokens, {victim: InternalError("not finite")})

    on_step(act)
    with caplog.at_level(logging.WARNING):
        failed, *others = llm.generate([list(prompt) for prompt, _ in prompts], GREEDY)
    assert [o.outputs[0].token_ids for o in others] == [list(a) for _, a in prompts[1:]]
    assert str(failed.error) == "not finite"
    assert failed.outputs[0].finish_reason == "error"
    assert failed.outputs[0].token_ids == list(prompts[0][1][:5])
    assert "1 of 3 requests failed" in caplog.text


def test_all_n_answers_end_when_the_first_fails(llm, on_step):
    def act(number, batch, real):
        result = real(batch)
        if number:
            return result
        return StepResult({}, {part.sequence_id: InternalError("gone") for part in batch.slices})

    on_step(act)
    params = SamplingParams(n=3, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate(random_prompt(40), params)
    assert [a.finish_reason for a in output.outputs] == ["error", "length", "length"]


def test_calls_from_several_threads_take_turns(llm):
    cases = [clear_case(tiny_model("qwen3"), length, 24) for length in (20, 33, 40)]
    found = {}

    def ask(number):
        found[number] = llm.generate(list(cases[number][0]), GREEDY)[0].outputs[0].token_ids

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: list(answer) for n, (_, answer) in enumerate(cases)}


def test_a_wrong_prompt_stops_the_call_before_anything_is_computed(llm, on_step):
    def act(number, batch, real):
        raise AssertionError("computed")

    on_step(act)
    with pytest.raises(Exception, match=r"prompts\[1\] has no tokens"):
        llm.generate([[1, 2], {"prompt_token_ids": []}], dataclasses.replace(GREEDY, n=1))


def test_an_end_that_is_interrupted_too_is_made_good_by_the_next_call(llm, on_step, monkeypatch):
    def act(number, batch, real):
        raise MemoryError

    def interrupted():
        raise KeyboardInterrupt

    on_step(act)
    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "_let_go", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([random_prompt(40, seed=n) for n in range(3)], GREEDY)
    assert llm._engine.scheduler.load().used_blocks > 0
    on_step(lambda number, batch, real: real(batch))
    still_answers(llm)
