"""A model in S3 is the model of the folder it was pushed from, to the last bit."""

import pytest
import torch
from s3_store import CuttingProxy
from tiny_checkpoints import tiny_checkpoint

from kvrelay import LLM, SamplingParams
from kvrelay.cli.main import main
from kvrelay_engine.models.weights import load_model_config, load_weights
from kvrelay_engine.runtime.warmup import fingerprint
from kvrelay_protocol.model_files import MODEL_FILES, resolve_model
from kvrelay_protocol.weights.pin import push_model
from kvrelay_protocol.weights.stream import StreamOptions

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SMALL = StreamOptions(streams=4, part_bytes=64 * 1024, window_bytes=256 * 1024)


def packed(directory, source=None, dtype=torch.float32):
    config = load_model_config(directory)
    return load_weights(directory, config, device=CPU, dtype=dtype, source=source)


def bits(weights):
    """Every tensor of a decoder, by place."""
    found = {"embedding": weights.embedding, "norm": weights.final_norm, "head": weights.head.data}
    for index, layer in enumerate(weights.layers):
        norms = (layer.input_norm, layer.post_attention_norm, layer.query_norm, layer.key_norm)
        found |= {f"{index}.norm{i}": n for i, n in enumerate(norms) if n is not None}
        for i, projection in enumerate(layer.projections):
            found[f"{index}.{i}"] = projection.data
            found |= {f"{index}.{i}.bias": projection.bias} if projection.bias is not None else {}
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama2", torch.float32), ("llama3", torch.bfloat16), ("qwen2", torch.float32)],
)
def test_streamed_weights_are_bitwise_those_of_the_folder(store, family, dtype):
    folder = tiny_checkpoint(family)
    files = resolve_model(store.put_folder(folder, family))
    source = files.open_weights(SMALL)
    assert_same(bits(packed(files.directory, source, dtype)), bits(packed(folder, dtype=dtype)))
    assert source.report().verified is False
    assert fingerprint(files.directory, source) == fingerprint(folder)
    source.close()


def test_a_pushed_model_is_verified_as_it_arrives(store):
    folder = tiny_checkpoint("qwen3")
    revision = push_model(folder, "s3://models/pushed", MODEL_FILES)
    files = resolve_model("s3://models/pushed")
    assert (files.name, files.revision) == ("pushed", revision)
    source = files.open_weights(SMALL)
    assert_same(bits(packed(files.directory, source)), bits(packed(folder)))
    report = source.report()
    assert report.verified is True
    assert report.nbytes == sum(tensor.nbytes for tensor in source.tensors.values())
    source.close()


def test_a_second_start_of_the_revision_asks_for_nothing_but_the_data(store, monkeypatch):
    url = store.put_folder(tiny_checkpoint("llama2"), "again")
    first = resolve_model(url)
    monkeypatch.setattr("kvrelay_protocol.weights.pin._list", None)
    second = resolve_model(url, revision=first.revision)
    assert second.directory == first.directory
    assert second.remote.objects == first.remote.objects


@pytest.mark.parametrize("limit", [3_000, 30_000])
def test_a_killed_connection_is_resumed_where_it_stopped(store, monkeypatch, limit):
    folder = tiny_checkpoint("llama2")
    url = store.put_folder(folder, "cut")
    proxy = CuttingProxy(store.port, limit=limit, cuts=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    files = resolve_model(url)
    proxy._left = 5
    source = files.open_weights(SMALL)
    assert_same(bits(packed(files.directory, source)), bits(packed(folder)))
    assert proxy.cut == 5
    assert source.report().resumed == 5
    source.close()
    files.remote.client.close()
    proxy.close()


def test_the_command_pushes_what_a_start_verifies(store, capsys):
    assert main(["weights", "push", str(tiny_checkpoint("llama3")), "s3://models/command"]) == 0
    files = resolve_model("s3://models/command")
    assert f"s3://models/command is at revision {files.revision}" in capsys.readouterr().out
    with LLM("s3://models/command", dtype="float32") as ours:
        found = ours.generate([{"prompt_token_ids": [1, 2, 3]}], GREEDY)
    with LLM(tiny_checkpoint("llama3"), dtype="float32") as theirs:
        expected = theirs.generate([{"prompt_token_ids": [1, 2, 3]}], GREEDY)
    assert found[0].outputs[0].token_ids == expected[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the one action is push"),
        (["pull", "a", "s3://b/c"], "weights pull: the one action is push"),
        (["push", "a"], "needs DIR and s3://bucket/prefix"),
        (["push", "s3://a/b", "s3://b/c"], "is in S3 already"),
    ],
)
def test_a_wrong_push_is_one_line(arguments, message, capsys):
    assert main(["weights", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
