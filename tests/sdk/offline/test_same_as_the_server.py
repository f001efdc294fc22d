"""What the engine is asked is what the router asks a decode worker for the same request."""

import pytest
from tiny_models import tiny_model

from kvrelay import SamplingParams
from kvrelay_router.http.caller import CallerWishes
from kvrelay_router.http.validation import plan_chat, plan_completion
from kvrelay_router.text.served_model import load_served_model

MODEL = tiny_model("qwen3")
WISHES = CallerWishes(None, None, 60.0)
BODIES = [
    {"seed": 7, "max_tokens": 5},
    {"seed": 2**64 - 1, "n": 3, "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
    {"seed": 1, "max_tokens": 5, "min_p": 0.1, "ignore_eos": True, "stop_token_ids": [9]},
    {"seed": 1, "max_tokens": 5, "temperature": 0},
]


def asked_offline(llm, monkeypatch, call):
    """The sequences that a call submits, by answer."""
    submitted = []
    submit = llm._engine.scheduler.submit
    with monkeypatch.context() as patch:
        patch.setattr(
            llm._engine.scheduler, "submit", lambda spec: submitted.append(spec) or submit(spec)
        )
        call()
    return [(s.tokens, s.sampling, s.max_tokens, s.stop_token_ids) for s in submitted]


def asked_over_http(plan):
    requests = [choice.request for choice in plan.choices]
    return [(r.prompt_tokens, r.sampling, r.max_tokens, r.stop_token_ids) for r in requests]


@pytest.mark.parametrize("body", BODIES, ids=str)
def test_completions(llm, monkeypatch, body):
    plan = plan_completion(
        load_served_model(MODEL, "m"), {"model": "m", "prompt": "the thing", **body}, WISHES
    )
    offline = asked_offline(
        llm, monkeypatch, lambda: llm.generate("the thing", SamplingParams(**body))
    )
    assert offline == asked_over_http(plan)


@pytest.mark.parametrize("body", BODIES, ids=str)
def test_chat(llm, monkeypatch, body):
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}]
    plan = plan_chat(
        load_served_model(MODEL, "m"), {"model": "m", "messages": messages, **body}, WISHES
    )
    offline = asked_offline(llm, monkeypatch, lambda: llm.chat(messages, SamplingParams(**body)))
    assert offline == asked_over_http(plan)
