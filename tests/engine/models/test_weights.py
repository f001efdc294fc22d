"""Reading checkpoints: fusing, shards, progress, and one clear error for each broken folder."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model, tiny_model

from kvrelay_engine.models.weights import load_model_config, load_weights
from kvrelay_kernels.linear import activation_dtype, pack_linear
from kvrelay_protocol.errors import InvalidModel, UnsupportedModel

CPU = torch.device("cpu")


def load(path, dtype=torch.float32, progress=None):
    config = load_model_config(path)
    return load_weights(path, config, device=CPU, dtype=dtype, progress=progress)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_model("llama2"), tmp_path / "model")


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **fields):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **fields}))


def test_projections_are_fused_in_order(folder):
    tensors = load_file(folder / "model.safetensors")
    weights = load(folder)
    for index, layer in enumerate(weights.layers):
        attention = f"model.layers.{index}.self_attn"
        parts = [tensors[f"{attention}.{name}_proj.weight"] for name in "qkv"]
        assert torch.equal(layer.qkv.dense(), torch.cat(parts))
        mlp = f"model.layers.{index}.mlp"
        gates = [tensors[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(layer.gate_up.dense(), torch.cat(gates))
    assert torch.equal(weights.head.dense(), tensors["lm_head.weight"])


def test_a_tied_head_is_the_embedding():
    weights = load(tiny_model("llama3"))
    assert torch.equal(weights.head.dense(), weights.embedding)


def test_a_sharded_checkpoint_loads_every_tensor():
    path = tiny_model("qwen3")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    weights = load(path)
    assert torch.equal(
        weights.layers[2].down.dense(), tensors["model.layers.2.mlp.down_proj.weight"]
    )
    assert torch.equal(weights.final_norm, tensors["model.norm.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast(dtype):
    wide, cast = load(tiny_model("qwen2")), load(tiny_model("qwen2"), dtype)
    bias = cast.layers[0].qkv.bias
    assert bias is not None
    assert bias.dtype == activation_dtype(CPU, dtype)
    packed = pack_linear([wide.layers[1].down.dense()], device=CPU, dtype=dtype)
    assert torch.equal(cast.layers[1].down.dense(), packed.dense())


@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_progress_rises_to_the_size_of_the_checkpoint(family):
    calls = []
    load(tiny_model(family), progress=lambda done, total: calls.append((done, total)))
    files = tiny_model(family).glob("*.safetensors")
    size = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    done = [call[0] for call in calls]
    assert {call[1] for call in calls} == {size}
    assert done == sorted(set(done))
    assert done[-1] == size


def test_end_tokens_of_the_generation_settings_are_added(folder):
    ends = load_model_config(folder).eos_token_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ends, 3]}))
    assert load_model_config(folder).eos_token_ids == (*ends, 3)
    (folder / "generation_config.json").unlink()
    assert load_model_config(folder).eos_token_ids == ends


def test_a_missing_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InvalidModel, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_many_missing_tensors_are_counted(folder):
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(InvalidModel, match=r"lack model\.layers\.3\..* and 8 more"):
        load(folder)


def test_an_untied_model_needs_its_head(folder):
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(InvalidModel, match=r"lm_head\.weight"):
        load(folder)


def test_a_wrong_shape_is_named_before_anything_is_read(folder):
    edit_config(folder, intermediate_size=80)
    calls = []
    with pytest.raises(InvalidModel, match=r"config\.json implies \[(80, 64|64, 80)\]"):
        load(folder, progress=lambda *call: calls.append(call))
    assert calls == []


def test_integer_weights_are_refused(folder):
    name = "model.norm.weight"
    edit_weights(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(InvalidModel, match=r"model\.norm\.weight is stored as I8"):
        load(folder)


def test_a_folder_that_is_not_a_model(tmp_path):
    with pytest.raises(InvalidModel, match="is not a folder"):
        load_model_config(tmp_path / "absent")
    with pytest.raises(InvalidModel, match=r"it has no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidModel, match="cannot read"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InvalidModel, match="JSON object"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["T5Model"]}')
    with pytest.raises(UnsupportedModel, match="T5Model"):
        load_model_config(tmp_path)


def test_weights_in_another_format(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidModel, match=r"neither model\.safetensors nor"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_a_cut_file(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(InvalidModel, match="cannot read the weights"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"model.norm.weight": "../outside.safetensors"}}', "weight_map"),
        ('{"weight_map": 3}', "weight_map"),
        ("{}", "weight_map"),
        ("no json", "cannot read"),
    ],
)
def test_an_unusable_index(folder, content, message):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InvalidModel, match=message):
        load(folder)


def test_an_index_that_names_the_wrong_file(tmp_path):
    path = shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = index["weight_map"]
    held = files["model.norm.weight"]
    files["model.norm.weight"] = next(file for file in files.values() if file != held)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidModel, match=r"lacks model\.norm\.weight"):
        load(path)


def test_an_index_that_names_an_absent_file(tmp_path):
    path = shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    absent = max(path.glob("model-*.safetensors"))
    absent.unlink()
    with pytest.raises(InvalidModel, match=f"lacks the weight file {absent.name}"):
        load(path)


def test_the_loader_does_not_need_transformers(tmp_path):
    import subprocess

    code = "import sys, kvrelay_engine.loading; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_biases_of_every_kind_are_loaded(tmp_path):
    path = build_tiny_model("llama2", tmp_path, attention_bias=True, mlp_bias=True)
    layer = load(path).layers[0]
    biases = tuple(projection.bias for projection in layer.projections)
    assert [None if bias is None else len(bias) for bias in biases] == [192, 64, 192, 64]
    config = replace(load_model_config(path), mlp_bias=False)
    weights = load_weights(path, config, device=CPU, dtype=torch.float32)
    assert weights.layers[0].gate_up.bias is None
