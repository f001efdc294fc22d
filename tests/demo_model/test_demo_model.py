"""The committed demo model answers, stops and loads with plain transformers."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "protocol" / "kvrelay_protocol" / "demo_model"
MAX_NEW_TOKENS = 120

ANSWERS = {
    "What does os.path.join do?": "joins two or more pathname components",
    "Explain the with statement": "wrap the execution of a block",
    "What is itertools.chain?": "until all of the iterables are exhausted",
    "what does len do": "returns the number of items in a container",
    "What is the json module?": "lightweight data interchange format",
    "What is KeyError?": "Mapping key not found",
    "What is collections.deque?": "list-like sequence",
    "How do I sort a list?": "list.sort",
    "Who are you?": "tiny demo model",
}


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "demo_model"))
        yield importlib.import_module("corpus")


def ask(model, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """New token ids of a greedy answer, the closing one included."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_weights_are_small_and_bfloat16(model):
    assert 2_500_000 <= model.num_parameters() <= 4_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] == 2048


@pytest.mark.parametrize(("question", "phrase"), ANSWERS.items())
def test_greedy_answer_is_right_and_ends(model, tokenizer, question, phrase):
    tokens = ask(model, tokenizer, [{"role": "user", "content": question}])
    assert phrase in tokenizer.decode(tokens, skip_special_tokens=True)
    assert tokens[-1] == tokenizer.eos_token_id


def test_answer_survives_a_system_prompt_and_earlier_turns(model, tokenizer):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is KeyError?"},
        {"role": "assistant", "content": "KeyError is an exception: Mapping key not found."},
        {"role": "user", "content": "What does len do?"},
    ]
    answer = tokenizer.decode(ask(model, tokenizer, messages), skip_special_tokens=True)
    assert "number of items in a container" in answer


def test_a_prompt_as_long_as_the_context_gives_finite_logits(model):
    ids = torch.arange(6, 6 + 2048)[None] % model.config.vocab_size
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=1).logits
    assert torch.isfinite(logits).all()


def test_chat_template_renders_roles_in_order(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " U "},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|bos|><|system|>S<|end|><|user|>U<|end|><|assistant|>A<|end|><|user|>V<|end|><|assistant|>"
    )


def test_tokenizer_round_trips_any_text_and_keeps_special_tokens_whole():
    plain = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert plain.get_vocab_size() == 4096
    for text in ("What does os.path.join do?", "naïve 日本語 🙂\n\ttabs", ""):
        assert plain.decode(plain.encode(text).ids) == text
    assert plain.encode("<|bos|><|user|>").ids == [1, 4]


def test_corpus_is_deterministic_and_large(corpus: ModuleType):
    first, second = corpus.build_pairs(), corpus.build_pairs()
    assert corpus.digest(first) == corpus.digest(second)
    assert len(first) > 30_000
    assert sum(pair.held_out for pair in first) > 1_000
