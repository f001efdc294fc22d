"""The models the other tests stand on: a server can run on their folders, and they are repeatable."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, SPECIALS, VOCAB_SIZE, build_tiny_model, clear_case, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_carries_a_tokenizer_with_a_chat_template(family):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model(family))
    text = "the thing – naïve 🙂 <|im_end|>"
    ids = tokenizer.encode(text)
    assert max(ids) < VOCAB_SIZE
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token == SPECIALS[2]
    turn = [{"role": "user", "content": "hi"}]
    shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    config = json.loads((tiny_model(family) / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == ids[-1]


def test_a_seed_fixes_the_weights(tmp_path):
    def weights(name, seed):
        return load_file(
            build_tiny_model("llama2", tmp_path / name, seed=seed) / "model.safetensors"
        )

    first, again, other = weights("a", 0), weights("b", 0), weights("c", 1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_building_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_tiny_model("llama2", tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a vocabulary of 266"):
        build_tiny_model("llama2", tmp_path, vocab_size=100)


def test_a_clear_case_stops_at_the_end_token_when_asked():
    path = tiny_model("llama3")
    full = clear_case(path, 9, 12)
    assert [len(part) for part in full] == [9, 12]
    end = json.loads((path / "config.json").read_text())["eos_token_id"]
    _, tokens = clear_case(path, 9, 12, ignore_eos=False)
    assert end not in tokens[:-1]
