"""What can go wrong with a model in S3: one line each, naming the bucket and the key."""

import shutil

import pytest
import torch
from s3_store import BUCKET, CuttingProxy
from tiny_checkpoints import tiny_checkpoint

from kvrelay.cli.main import main
from kvrelay_engine.models.weights import load_model_config, load_weights
from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.model_files import MODEL_FILES, resolve_model
from kvrelay_protocol.weights import s3
from kvrelay_protocol.weights.pin import push_model
from kvrelay_protocol.weights.stream import StreamOptions

SMALL = StreamOptions(streams=2, part_bytes=64 * 1024, window_bytes=256 * 1024)
FAMILY = "llama2"


def load(files):
    source = files.open_weights(SMALL)
    config = load_model_config(files.directory)
    try:
        load_weights(
            files.directory, config, device=torch.device("cpu"), dtype=torch.float32, source=source
        )
    finally:
        source.close()


def refused(work) -> str:
    with pytest.raises(InvalidModel) as caught:
        work()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    return str(caught.value)


def damage(store, key, at=-100):
    """Flip one byte of an object in place."""
    body = bytearray(store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    body[at] ^= 1
    store.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://absent/model", "bucket absent does not exist"),
        ("s3://models/nothing/here", "s3://models/nothing/here holds no model"),
        ("s3:///model", "is not an S3 location; give s3://bucket/prefix"),
        ("s3://models/a?x=1", "is not an S3 location"),
    ],
)
def test_a_place_without_a_model(store, url, message):
    assert message in refused(lambda: resolve_model(url))


def test_a_model_without_weights(store):
    store.client.put_object(Bucket=BUCKET, Key="bare/config.json", Body=b"{}")
    files = resolve_model("s3://models/bare")
    assert "s3://models/bare has no *.safetensors weights" in refused(files.headers)


def test_an_object_that_is_no_safetensors_file(store):
    store.client.put_object(Bucket=BUCKET, Key="odd/model.safetensors", Body=b"version https")
    message = refused(lambda: resolve_model("s3://models/odd"))
    assert "s3://models/odd/model.safetensors is not a safetensors file" in message


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("AccessDenied", 403, "access to s3://models/x/model.safetensors is denied"),
        ("NoSuchKey", 404, "s3://models/x/model.safetensors does not exist"),
        ("PreconditionFailed", 412, "s3://models/x/model.safetensors has changed"),
        ("ExpiredToken", 400, "session token has expired"),
        ("Unheard", 400, "cannot read s3://models/x/model.safetensors: "),
    ],
)
def test_what_the_store_answers(code, status, message):
    from botocore.exceptions import ClientError

    answer = {
        "Error": {"Code": code, "Message": "words"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error = ClientError(answer, "GetObject")
    location = s3.S3Location.parse("s3://models/x")
    assert message in refused(
        lambda: (_ for _ in ()).throw(s3.explain(error, location, "x/model.safetensors"))
    )


def test_no_credentials(store, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = refused(lambda: resolve_model("s3://models/any"))
    assert message.startswith("no AWS credentials for s3://models/any")


def test_an_object_that_changes_during_a_start_is_refused(store):
    files = resolve_model(store.put_folder(tiny_checkpoint(FAMILY), "changing"))
    damage(store, "changing/model.safetensors")
    message = refused(lambda: load(files))
    assert "s3://models/changing/model.safetensors has changed since this start began" in message


def test_another_revision_than_the_one_asked_for_is_refused(store):
    url = store.put_folder(tiny_checkpoint(FAMILY), "moving")
    before = resolve_model(url).revision
    damage(store, "moving/model.safetensors")
    after = resolve_model(url).revision
    assert after != before
    shutil.rmtree(resolve_model(url).directory.parent / before)
    message = refused(lambda: resolve_model(url, revision=before))
    assert f"is at revision {after}, --revision asks for {before}" in message


def test_a_versioned_bucket_still_has_what_a_start_was_pinned_to(store):
    store.client.create_bucket(Bucket="versioned")
    store.client.put_bucket_versioning(
        Bucket="versioned", VersioningConfiguration={"Status": "Enabled"}
    )
    for path in tiny_checkpoint(FAMILY).iterdir():
        store.client.put_object(Bucket="versioned", Key=path.name, Body=path.read_bytes())
    files = resolve_model("s3://versioned")
    assert files.name == "versioned"
    store.client.put_object(Bucket="versioned", Key="model.safetensors", Body=b"another")
    load(files)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_wrong_checksum_stops_the_start(store, name):
    prefix = f"damaged-{name}"
    push_model(tiny_checkpoint(FAMILY), f"s3://models/{prefix}", MODEL_FILES)
    load(resolve_model(f"s3://models/{prefix}"))
    damage(store, f"{prefix}/{name}")
    message = refused(lambda: load(resolve_model(f"s3://models/{prefix}")))
    assert message.startswith("wrong checksum: ")
    assert f"s3://models/{prefix}/{name}" in message


def test_a_wrong_checksum_in_a_header_stops_the_start(store):
    push_model(tiny_checkpoint(FAMILY), "s3://models/head", MODEL_FILES)
    body = store.client.get_object(Bucket=BUCKET, Key="head/model.safetensors")["Body"].read()
    changed = body.replace(b'"format":"pt"', b'"format":"tp"')
    assert changed != body
    store.client.put_object(Bucket=BUCKET, Key="head/model.safetensors", Body=changed)
    message = refused(lambda: resolve_model("s3://models/head"))
    assert message.startswith("wrong checksum: s3://models/head/model.safetensors")


def test_a_network_that_stays_broken_is_given_up(store, monkeypatch):
    monkeypatch.setattr(s3, "_BACKOFF_S", 0.0)
    files = resolve_model(store.put_folder(tiny_checkpoint(FAMILY), "broken"))
    proxy = CuttingProxy(store.port, limit=2000, cuts=10_000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    broken = s3.connect(2)
    ranges = s3.S3Ranges(broken, files.remote.location, files.remote.objects)
    into = memoryview(bytearray(200_000))
    message = refused(lambda: ranges.fetch("model.safetensors", 10_000, into, lambda _: None))
    assert "s3://models/broken/model.safetensors bytes 10000 to 210000" in message
    assert f"given up after {s3.TRIES} tries" in message
    broken.close()
    proxy.close()


def test_the_command_says_it_in_one_line(store, capsys):
    assert main(["up", "s3://absent/model", "--port", "0", "--join-port", "0"]) == 3
    assert capsys.readouterr().err == "kvrelay: bucket absent does not exist\n"
