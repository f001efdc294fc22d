"""Everything a caller can get wrong is one line that names it, its limit and what to do."""

import subprocess
import sys

import pytest
from tiny_models import random_prompt, tiny_model

from kvrelay import LLM, SamplingParams
from kvrelay.offline import arguments
from kvrelay.offline.progress import Progress
from kvrelay_protocol.errors import (
    ContextOverflow,
    DeviceUnavailable,
    InvalidModel,
    InvalidRequest,
    NotEnoughMemory,
    UsageError,
)

MODEL = tiny_model("qwen3")


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n": 0}, "n is 0; it must be a whole number of at least 1"),
        ({"n": 2, "temperature": 0}, "n is 2; it must be 1 with temperature=0"),
        ({"temperature": -1}, "temperature is -1; it must be a number at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"min_p": 2}, "min_p is 2"),
        ({"presence_penalty": 3}, "presence_penalty is 3; it must be a number at least -2 and at"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number above 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 17}, "min_tokens is 17; it must be at most max_tokens=16"),
        ({"logprobs": -2}, "logprobs is -2"),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": [3]}, "a string or a list of strings"),
        ({"stop": "x", "detokenize": False}, "detokenize=False"),
        ({"stop_token_ids": ["a"]}, "a list of token ids"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be True or False"),
        ({"logit_bias": {1: 2.0}}, "SamplingParams: logit_bias={1: 2.0} is not supported; leave"),
        ({"best_of": 3}, "best_of=3 is not supported; use n"),
        ({"prompt_logprobs": 1}, "prompt_logprobs=1 is not supported"),
    ],
)
def test_sampling_parameters_are_checked_when_they_are_made(given, says):
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**given)
    assert says in one_line(error)
    assert error.value.param in given


def test_neutral_values_of_vllms_other_parameters_are_taken():
    neutral = {name: entry.neutral[0] for name, entry in arguments.SAMPLING.items()}
    assert SamplingParams(**neutral, top_k=-1) == SamplingParams(top_k=-1)
    assert SamplingParams(stop="a").stop_strings == ("a",)


def test_a_misspelt_parameter_is_named_with_its_neighbour():
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        SamplingParams(max_token=3)
    with pytest.raises(TypeError, match="did you mean 'max_num_seqs'"):
        LLM(MODEL, max_num_seq=3)
    with pytest.raises(TypeError, match="keyword arguments only"):
        SamplingParams(1)


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"tensor_parallel_size": 2}, UsageError, "LLM: tensor_parallel_size=2 is not supported;"),
        ({"trust_remote_code": True}, UsageError, "trust_remote_code=True is not supported"),
        ({"block_size": 0}, UsageError, "block_size=0; it must be a whole number of at least 1"),
        ({"max_num_seqs": 1.5}, UsageError, "max_num_seqs=1.5"),
        ({"gpu_memory_utilization": 2}, UsageError, "above 0 and at most 1"),
        ({"threads": -1}, UsageError, "threads=-1"),
        ({"seed": "x"}, UsageError, "seed='x'"),
        ({"dtype": "int3"}, UsageError, "dtype 'int3' is none of"),
        ({"quantization": "awq"}, UsageError, "quantization='awq' is not supported; use 'int8'"),
        ({"device": "tpu"}, UsageError, "device='tpu'; it must be"),
        ({"device": "cuda:99"}, DeviceUnavailable, "use device='cpu'"),
        ({"max_model_len": 4096}, UsageError, "exceeds the model's own limit of 2048"),
        (
            {"kv_cache_memory_bytes": 200_000, "max_model_len": 1024},
            NotEnoughMemory,
            "raise kv_cache_memory_bytes or lower max_model_len",
        ),
        ({"kv_cache_memory_bytes": 1}, NotEnoughMemory, "raise kv_cache_memory_bytes"),
        ({"tokenizer": "/nowhere/at/all"}, InvalidModel, "/nowhere/at/all does not exist"),
    ],
)
def test_engine_arguments_are_checked(given, kind, says):
    with pytest.raises(kind) as error:
        LLM(MODEL, **{"device": "cpu", **given})
    assert says in one_line(error)


def test_neutral_values_of_vllms_other_arguments_are_taken(build):
    build(**{name: entry.neutral[-1] for name, entry in arguments.ENGINE.items()})


def test_a_model_that_is_none_is_named(tmp_path):
    with pytest.raises(InvalidModel, match="it has no config"):
        LLM(tmp_path)
    with pytest.raises(InvalidModel, match="does not exist"):
        LLM("/nowhere/model")


@pytest.mark.parametrize(
    ("prompts", "kind", "says"),
    [
        (3, InvalidRequest, "prompts is a int; it must be a string"),
        ([["a"]], InvalidRequest, "prompts[0] is str; it must be a list of token ids"),
        ([None], InvalidRequest, "prompts[0] is None"),
        ([""], InvalidRequest, "prompts[0] has no tokens"),
        ("", InvalidRequest, "prompt has no tokens"),
        ([[1], []], InvalidRequest, "prompts[1] has no tokens"),
        ([[1, 320]], InvalidRequest, "token 320, outside the model's vocabulary of 320"),
        ([[-1, 3]], InvalidRequest, "token -1"),
        ([[1, 2.5]], InvalidRequest, "prompts[0] is 2.5"),
        ([[True, 1.0]], InvalidRequest, "prompts[0] is True"),
        ({"prompt_token_ids": "abc"}, InvalidRequest, "prompt is str"),
        ({"prompt": 3}, InvalidRequest, "prompt['prompt'] is 3; it must be a string"),
        ({"cache_salt": "x"}, InvalidRequest, "has neither a 'prompt' nor 'prompt_token_ids'"),
        ({"prompt": "x", "multi_modal_data": {}}, InvalidRequest, "has a key 'multi_modal_data'"),
        ([random_prompt(2048)], ContextOverflow, "prompts[0] has 2048 tokens; with one for the"),
        ("y" * 100_000, ContextOverflow, "prompt has more than 2048 tokens"),
    ],
)
def test_prompts_are_checked(llm, prompts, kind, says):
    with pytest.raises(kind) as error:
        llm.generate(prompts)
    assert says in one_line(error)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (SamplingParams(stop_token_ids=[320]), "stop_token_ids has 320; it must be below the"),
        (SamplingParams(logprobs=21), "logprobs is 21; it must be at most 20; raise LLM(max_log"),
        (SamplingParams(logprobs=-1), "logprobs is -1; it must be at most 20"),
        ([SamplingParams()] * 3, "has 3 entries; it must be one for each of 2 prompts"),
        ({"n": 1}, "sampling_params is a dict"),
        ([None, None], "it must be SamplingParams or a list of them"),
    ],
)
def test_parameters_are_checked_against_the_model(llm, params, says):
    with pytest.raises(InvalidRequest) as error:
        llm.generate(["a", "b"], params)
    assert says in one_line(error)


def test_arguments_of_a_call_are_checked(llm):
    with pytest.raises(InvalidRequest, match=r"LLM\.generate: lora_request=3 is not supported"):
        llm.generate("a", lora_request=3)
    with pytest.raises(InvalidRequest, match=r"LLM\.chat: tools=\[1\] is not supported"):
        llm.chat([{"role": "user", "content": "a"}], tools=[1])
    with pytest.raises(TypeError, match="did you mean 'use_tqdm'"):
        llm.generate("a", use_tqd=False)
    assert llm.generate("a", lora_request=None, priority=None)


def test_without_a_tokenizer_text_is_refused(build):
    llm = build(skip_tokenizer_init=True)
    with pytest.raises(InvalidRequest, match="skip_tokenizer_init=True loaded no tokenizer"):
        llm.generate("text")
    with pytest.raises(InvalidRequest, match="skip_tokenizer_init=True"):
        llm.chat([{"role": "user", "content": "a"}])
    with pytest.raises(InvalidRequest, match="None with skip_tokenizer_init=True"):
        llm.generate([1, 2], SamplingParams(stop="a"))


def test_a_model_without_a_template_does_not_chat(llm, monkeypatch):
    import dataclasses

    tokenizer = llm.get_tokenizer()
    bare = dataclasses.replace(tokenizer._served, template=None)
    monkeypatch.setattr(tokenizer, "_served", bare)
    with pytest.raises(InvalidRequest, match="has no chat template; use generate"):
        llm.chat([{"role": "user", "content": "a"}])


def test_defaults_are_those_of_the_model(llm, monkeypatch):
    import dataclasses

    from kvrelay_protocol.sampling import SamplingParams as Engine

    tokenizer = llm.get_tokenizer()
    named = dataclasses.replace(
        tokenizer._served, sampling_defaults=Engine(temperature=0.6, top_k=20, top_p=0.9)
    )
    monkeypatch.setattr(tokenizer, "_served", named)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=20, top_p=0.9)
    assert len(llm.generate([1, 2])[0].outputs[0].token_ids) <= 16


class FakeBar:
    def __init__(self, **options):
        self.options, self.done, self.closed, self.notes = options, 0, False, []

    def update(self, n=1):
        self.done += n

    def close(self):
        self.closed = True

    def set_postfix_str(self, s, refresh=True):
        self.notes.append(s)


def test_progress_counts_prompts_and_is_quiet_without_a_terminal(llm, capfd):
    bars = []
    llm.generate(["a", "b", "c"], use_tqdm=lambda **o: bars.append(FakeBar(**o)) or bars[0])
    assert (bars[0].done, bars[0].closed, bars[0].options["total"]) == (3, True, 3)
    assert "output" in bars[0].notes[-1] and "tokens/s" in bars[0].notes[-1]
    llm.generate(["a", "b", "c"])
    assert capfd.readouterr() == ("", "")
    assert Progress(False, total=1, description="x").close() is None


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_the_engine_brings_no_server_and_no_transport():
    done = run(f"""
import sys
from kvrelay import LLM, SamplingParams
assert "torch" not in sys.modules and "numpy" not in sys.modules
with LLM({str(MODEL)!r}, device="cpu") as llm:
    llm.generate("a", SamplingParams(max_tokens=2))
tops = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(tops & {{"grpc", "ucxx", "fastapi", "starlette", "uvicorn", "httpx", "opentelemetry"}}))
""")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("missing", ["torch", "jinja2"])
def test_a_bare_installation_says_what_to_install(missing):
    done = run(f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
from kvrelay import Client, RequestOutput, SamplingParams, TextPrompt
try:
    from kvrelay import LLM
except ImportError as error:
    print(error)
""")
    assert done.stdout.strip() == (
        f"kvrelay.LLM needs {missing}, which is not installed: pip install 'kvrelay[all]'"
    ), done.stderr
