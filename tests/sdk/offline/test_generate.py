"""Answers against transformers, however prompts are batched, shared, preempted or cut off."""

import dataclasses
import weakref

import pytest
from tiny_models import FAMILIES, clear_case, random_prompt, tiny_model

from kvrelay import LLM, SamplingParams
from kvrelay_protocol.errors import Draining, InvalidRequest

MODEL = tiny_model("qwen3")
NEW = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, seed=11, ignore_eos=True)


def prompts_and_answers(lengths):
    cases = [clear_case(MODEL, length, NEW) for length in lengths]
    return [{"prompt_token_ids": list(p)} for p, _ in cases], [list(a) for _, a in cases]


def ids(outputs):
    return [answer.token_ids for output in outputs for answer in output.outputs]


def test_greedy_answers_are_those_of_transformers_in_prompt_order(llm):
    prompts, answers = prompts_and_answers((5, 1, 40, 17, 64, 3, 100))
    outputs = llm.generate(prompts, GREEDY)
    assert ids(outputs) == answers
    assert [o.prompt_token_ids for o in outputs] == [p["prompt_token_ids"] for p in prompts]
    assert all(o.finished and o.error is None for o in outputs)
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3"])
def test_every_family(family):
    prompt, answer = clear_case(tiny_model(family), 33, NEW)
    with LLM(tiny_model(family), dtype="float32", device="cpu", threads=1) as llm:
        assert ids(llm.generate(list(prompt), GREEDY)) == [list(answer)]


def test_a_batch_samples_what_each_prompt_samples_alone(llm):
    prompts = [random_prompt(length) for length in (3, 20, 48, 7)]
    together = ids(llm.generate(prompts, SAMPLED))
    assert together == [ids(llm.generate(prompt, SAMPLED))[0] for prompt in prompts]


def test_more_prompts_than_sequences_fit_in_a_step(build):
    prompts, answers = prompts_and_answers(range(2, 12))
    assert ids(build(max_num_seqs=3).generate(prompts, GREEDY)) == answers


def test_long_prompts_are_computed_in_chunks(build):
    prompts, answers = prompts_and_answers((100, 5, 64, 17))
    llm = build(max_num_batched_tokens=32, enable_prefix_caching=False)
    sizes = []
    step = llm._engine.runner.step
    llm._engine.runner.step = lambda batch: sizes.append(batch.num_tokens) or step(batch)
    assert ids(llm.generate(prompts, GREEDY)) == answers
    assert max(sizes) <= 32 + len(prompts)


def test_a_pool_that_is_too_small_preempts_and_answers_alike(build):
    prompts, answers = prompts_and_answers((40, 33, 40, 35, 64, 17))
    llm = build(num_gpu_blocks_override=12, max_num_batched_tokens=512)
    assert ids(llm.generate(prompts, GREEDY)) == answers
    assert llm._engine.scheduler.load().preemptions > 0


@pytest.mark.parametrize("caching", [True, False])
def test_a_common_beginning_is_computed_once_where_caching_is_on(build, caching):
    llm = build(enable_prefix_caching=caching, max_num_batched_tokens=64)
    common = random_prompt(64)
    prompts = [[*common, n] for n in range(6)]
    cached = [o.num_cached_tokens for o in llm.generate(prompts, GREEDY)]
    assert cached == [0] + [64 if caching else 0] * 5


def test_salts_keep_prompts_apart(llm):
    prompt = {"prompt_token_ids": random_prompt(64)}
    llm.generate(prompt, GREEDY)
    assert llm.generate(prompt, GREEDY)[0].num_cached_tokens == 48
    assert llm.generate({**prompt, "cache_salt": "x"}, GREEDY)[0].num_cached_tokens == 0


def test_n_answers_share_the_prompt_and_differ(llm):
    computed = []
    step = llm._engine.runner.step
    llm._engine.runner.step = lambda batch: computed.append(batch.num_tokens) or step(batch)
    try:
        prompt = random_prompt(100)
        (output,) = llm.generate(prompt, dataclasses.replace(SAMPLED, n=4))
    finally:
        llm._engine.runner.step = step
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4
    # 96 of 100 tokens are in full blocks: the other three answers compute four each.
    assert sum(computed) == 100 + 3 * 4 + 4 * (SAMPLED.max_tokens - 1)
    alone = [
        llm.generate(prompt, dataclasses.replace(SAMPLED, seed=SAMPLED.seed + index))
        for index in range(4)
    ]
    assert [answer.token_ids for answer in output.outputs] == [ids(one)[0] for one in alone]


def test_each_prompt_may_have_its_own_parameters(llm):
    prompt = random_prompt(20)
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in (1, 5, 3)]
    assert [len(tokens) for tokens in ids(llm.generate([prompt] * 3, params))] == [1, 5, 3]


def test_the_engines_seed_decides_where_a_request_has_none(build):
    unseeded = dataclasses.replace(SAMPLED, seed=None)
    prompts = [random_prompt(20)] * 3
    first, second = (ids(build(seed=5).generate(prompts, unseeded)) for _ in range(2))
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == 3
    assert ids(build(seed=6).generate(prompts, unseeded)) != first
    assert ids(build(seed=None).generate(prompts, unseeded)) != first


def test_an_answer_ends_where_the_context_does(build):
    llm = build(max_model_len=32)
    (output,) = llm.generate(random_prompt(30), SamplingParams(max_tokens=50, ignore_eos=True))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (2, "length")
    (output,) = llm.generate(random_prompt(20), SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 12


def test_the_default_pool_limits_the_context_only_to_what_it_holds(build):
    assert build(num_gpu_blocks_override=None, kv_cache_memory_bytes=1 << 22).max_model_len == 2048
    assert build(num_gpu_blocks_override=4).max_model_len == 64
    assert build(num_gpu_blocks_override=None).max_model_len == 2048


def test_metrics_are_in_order(llm):
    metrics = llm.generate(random_prompt(20), GREEDY)[0].metrics
    times = dataclasses.astuple(metrics)
    assert list(times) == sorted(times)
    assert times[0] < times[-1]


def test_no_prompts_no_answers(llm):
    assert llm.generate([], GREEDY) == []


def test_token_prompts_need_no_tokenizer(build):
    llm = build(skip_tokenizer_init=True)
    prompts, answers = prompts_and_answers((17,))
    (output,) = llm.generate(prompts, dataclasses.replace(GREEDY, logprobs=1))
    assert output.outputs[0].token_ids == answers[0]
    assert output.outputs[0].text == ""
    (entry, *_) = output.outputs[0].logprobs
    assert next(iter(entry.values())).decoded_token is None


def test_a_shut_down_engine_says_so():
    with LLM(MODEL, device="cpu") as llm:
        pass
    llm.shutdown()
    with pytest.raises(Draining, match="shut down"):
        llm.generate("x")


def test_shutting_down_gives_weights_and_pool_back():
    llm = LLM(MODEL, device="cpu", threads=1)
    pool = weakref.ref(llm._engine.runner.pool)
    llm.shutdown()
    assert pool() is None, "without a collection"


def test_another_tokenizer_reads_and_writes_the_text(build):
    llm = build(tokenizer="kvrelay-demo")
    (output,) = llm.generate([7, 8, 9], GREEDY)
    assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)
    with pytest.raises(InvalidRequest, match="outside the model's vocabulary of 320"):
        llm.generate("What does os.path.join do?")


def test_eight_bit_weights_answer_nearly_alike(build):
    params = dataclasses.replace(GREEDY, max_tokens=1, logprobs=20)
    prompt = random_prompt(20)
    exact, rounded = (
        build(quantization=name).generate(prompt, params)[0].outputs[0].logprobs[0]
        for name in (None, "int8")
    )
    both = exact.keys() & rounded.keys()
    assert len(both) > 10
    apart = [abs(exact[token].logprob - rounded[token].logprob) for token in both]
    assert 0 < max(apart) < 1
