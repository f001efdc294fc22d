"""Penalties and logprobs against their formulas on transformers' logits."""

import dataclasses
import math

import pytest
import torch
from tiny_models import CLEAR_MARGIN, clear_case, random_prompt, reference_logits, tiny_model

from kvrelay import SamplingParams

MODEL = tiny_model("qwen3")
PROMPT, ANSWER = clear_case(MODEL, 17, 24)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PENALTIES = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.5},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
]


def raw_logits(prompt, tokens):
    """What the model says at each of the answer's positions, `[tokens, vocabulary]`."""
    return reference_logits(MODEL, [*prompt, *tokens])[len(prompt) - 1 : -1]


def penalised(logits, prompt, output, *, presence_penalty=0.0, frequency_penalty=0.0, **rest):
    """transformers' processor, then the formula of the OpenAI API."""
    from transformers import RepetitionPenaltyLogitsProcessor

    repetition = RepetitionPenaltyLogitsProcessor(rest.get("repetition_penalty", 1.0))
    row = repetition(torch.tensor([[*prompt, *output]]), logits.unsqueeze(0).clone())[0]
    for token in set(output):
        row[token] -= presence_penalty + frequency_penalty * output.count(token)
    return row


def check_penalties(prompt, tokens, **penalties):
    logits = raw_logits(prompt, tokens)
    for at, token in enumerate(tokens):
        row = penalised(logits[at], prompt, tokens[:at], **penalties)
        assert row[token] >= row.max() - CLEAR_MARGIN, f"token {at}"


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_penalties_are_those_of_transformers_and_openai(llm, penalties):
    (output,) = llm.generate(list(PROMPT), dataclasses.replace(GREEDY, **penalties))
    tokens = output.outputs[0].token_ids
    assert tokens != list(ANSWER), "the penalty changed nothing"
    check_penalties(PROMPT, tokens, **penalties)


def test_rows_of_one_batch_have_their_own_penalties(llm):
    prompts = [random_prompt(9 + n, seed=n) for n in range(len(PENALTIES))]
    params = [dataclasses.replace(GREEDY, **p) for p in PENALTIES]
    params.append(dataclasses.replace(GREEDY, min_tokens=3))
    outputs = llm.generate([*prompts, list(PROMPT)], params)
    for prompt, output, penalties in zip(prompts, outputs, PENALTIES, strict=False):
        check_penalties(prompt, output.outputs[0].token_ids, **penalties)
    assert outputs[-1].outputs[0].token_ids == list(ANSWER)


def test_penalties_outlast_a_preemption(build):
    llm = build(num_gpu_blocks_override=8, enable_prefix_caching=False)
    prompts = [random_prompt(30, seed=n) for n in range(4)]
    outputs = llm.generate(prompts, dataclasses.replace(GREEDY, **PENALTIES[-1]))
    assert llm._engine.scheduler.load().preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        check_penalties(prompt, output.outputs[0].token_ids, **PENALTIES[-1])


def check_logprobs(prompt, answer, top):
    expected = raw_logits(prompt, answer.token_ids).double().log_softmax(-1)
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, entry, row in zip(answer.token_ids, answer.logprobs, expected, strict=True):
        ranked = row.argsort(descending=True)
        assert set(entry) == {token, *ranked[:top].tolist()}
        for token_id, found in entry.items():
            assert found.logprob == pytest.approx(row[token_id].item(), abs=1e-3)
            assert found.rank == (ranked == token_id).nonzero().item() + 1
    total = sum(
        entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)
    )
    assert answer.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("top", [0, 1, 5])
@pytest.mark.parametrize("temperature", [0, 1.7])
def test_logprobs_are_the_models_own(llm, top, temperature):
    params = SamplingParams(
        temperature=temperature, top_k=40, seed=5, max_tokens=8, ignore_eos=True, logprobs=top
    )
    (output,) = llm.generate(list(PROMPT), params)
    check_logprobs(PROMPT, output.outputs[0], top)


def test_logprobs_are_taken_before_penalties_and_bans(llm):
    params = dataclasses.replace(
        GREEDY, **PENALTIES[-1], logprobs=3, min_tokens=20, stop_token_ids=[ANSWER[0]]
    )
    (output,) = llm.generate(list(PROMPT), params)
    answer = output.outputs[0]
    check_logprobs(PROMPT, answer, 3)
    assert answer.token_ids[0] != ANSWER[0]
    assert answer.logprobs[0][ANSWER[0]].rank == 1


def test_only_those_who_ask_get_logprobs(llm):
    params = [dataclasses.replace(GREEDY, logprobs=top) for top in (None, 2, None, 4)]
    outputs = llm.generate([list(PROMPT)] * 4, params)
    assert [o.outputs[0].logprobs is None for o in outputs] == [True, False, True, False]
    assert outputs[0].outputs[0].cumulative_logprob is None
    for output, top in ((outputs[1], 2), (outputs[3], 4)):
        check_logprobs(PROMPT, output.outputs[0], top)


def test_all_logprobs_sum_to_one(build):
    llm = build(max_logprobs=-1)
    (output,) = llm.generate(list(PROMPT), dataclasses.replace(GREEDY, max_tokens=1, logprobs=-1))
    (entry,) = output.outputs[0].logprobs
    assert len(entry) == 320
    assert sum(math.exp(found.logprob) for found in entry.values()) == pytest.approx(1, abs=1e-4)


def test_each_entry_has_its_tokens_text(llm):
    (output,) = llm.generate(list(PROMPT), dataclasses.replace(GREEDY, logprobs=2))
    tokenizer = llm.get_tokenizer()
    for entry in output.outputs[0].logprobs:
        for token_id, found in entry.items():
            assert found.decoded_token == tokenizer.decode([token_id], skip_special_tokens=False)
