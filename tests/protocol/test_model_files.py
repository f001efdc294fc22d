import pytest
from tiny_models import tiny_model

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.model_files import DEMO_MODEL_NAME, ModelFiles, resolve_model


def test_no_reference_is_the_demo_model():
    files = resolve_model(None)
    assert files.name == DEMO_MODEL_NAME
    assert resolve_model(DEMO_MODEL_NAME) == files
    assert files.read_config()["model_type"] == "llama"
    assert files.weight_files()
    assert files.require_tokenizer().is_file()


def test_a_folder_is_named_after_itself():
    folder = tiny_model("llama3")
    assert resolve_model(str(folder)) == ModelFiles(folder.name, folder.resolve())


@pytest.mark.parametrize("reference", ["/nowhere/at/all", "./missing", "missing-model", "a/b/c"])
def test_a_missing_folder_is_named(reference):
    with pytest.raises(InvalidModel, match=f"{reference} does not exist"):
        resolve_model(reference)


def test_a_hub_that_can_not_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args: object, **options: object) -> str:
        raise OSError("no route\nwith a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InvalidModel, match=r"^model owner/name@v1 is neither .*: no route$"):
        resolve_model("owner/name", revision="v1")


def test_a_hub_id_is_fetched_with_its_revision_and_only_what_is_needed(monkeypatch, tmp_path):
    import huggingface_hub

    calls = []

    def fetch(reference: str, *, revision: str, allow_patterns: list[str]) -> str:
        calls.append((reference, revision, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("owner/name", revision="v1").directory == tmp_path
    resolve_model("owner/name", weights=False)
    assert calls == [("owner/name", "v1", True), ("owner/name", None, False)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no config.json"), ("{", "not valid JSON"), ("[]", "not a JSON object")],
)
def test_a_folder_that_is_no_model_says_why(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    files = ModelFiles("x", tmp_path)
    with pytest.raises(InvalidModel, match=message):
        files.read_config()
    with pytest.raises(InvalidModel, match="safetensors"):
        files.weight_files()
    with pytest.raises(InvalidModel, match=r"tokenizer\.json"):
        files.require_tokenizer()


def test_reading_ahead_is_a_hint_that_never_fails(tmp_path):
    resolve_model(None).read_ahead()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    ModelFiles("broken", tmp_path).read_ahead()
