"""The benchmark models: complete folders, the same bytes each time."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from kvrelay_bench.models import MODELS, bench_model, find_model, read_shape
from kvrelay_protocol.errors import UsageError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return bench_model("tiny", root=tmp_path_factory.mktemp("models"))


def test_the_weights_are_bf16_of_the_configured_shapes_and_deviation(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="auto")
    assert model.dtype == torch.bfloat16
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == MODELS["tiny"].parameters
    down = model.model.layers[1].mlp.down_proj.weight.float()
    assert down.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_same_weights_are_made_again(tiny, tmp_path):
    again = bench_model("tiny", root=tmp_path)
    assert again.name == tiny.name
    assert (again / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_a_made_model_is_kept(tiny):
    before = (tiny / "model.safetensors").stat().st_mtime_ns
    assert bench_model("tiny", root=tiny.parent) == tiny
    assert (tiny / "model.safetensors").stat().st_mtime_ns == before
    assert [path for path in tiny.parent.iterdir() if path.name.startswith(".")] == []


def test_text_goes_through_the_tokenizer_and_back_and_every_id_has_a_text(tiny):
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "Grüße, 世界!\n\tx"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == MODELS["tiny"].vocab_size
    assert all(tokenizer.decode([token]) for token in range(262, 512))


def test_the_chat_template_renders(tiny):
    from transformers import AutoTokenizer

    rendered = AutoTokenizer.from_pretrained(tiny).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|bos|><|user|>hi<|end|><|assistant|>"


def test_the_shape_is_read_back(tiny):
    assert read_shape(tiny) == MODELS["tiny"]


def test_counted_linear_weights_are_those_of_the_checkpoint(tiny):
    with safe_open(tiny / "model.safetensors", framework="np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    assert MODELS["tiny"].linear_parameters == matrices


def test_the_half_billion_model_has_half_a_billion_parameters():
    assert MODELS["0.5b"].parameters == 487_650_560


def test_an_unknown_name_lists_the_sizes():
    with pytest.raises(UsageError, match=r"model 7b is neither .* \(tiny, 135m, 0.5b\)"):
        find_model("7b")
    with pytest.raises(UsageError, match=r"model size 7b is unknown; there are tiny, 135m, 0\.5b"):
        bench_model("7b")


def test_a_folder_is_taken_as_it_is(tiny):
    assert find_model(str(tiny)) == tiny


def test_a_full_disk_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 # as shutil's own
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 9, 1))
    with pytest.raises(UsageError, match=r"model tiny takes .* free; set XDG_CACHE_HOME"):
        bench_model("tiny", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    from kvrelay_infra import host
    from kvrelay_protocol.errors import NotEnoughMemory

    monkeypatch.setattr(host, "read_memory", lambda: host.Memory(1000, 1000))
    with pytest.raises(NotEnoughMemory, match=r"model tiny takes .* take a smaller one"):
        bench_model("tiny", root=tmp_path)


def test_the_configuration_names_a_known_architecture(tiny):
    config = json.loads((tiny / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
