"""Which files are a model, and where they are: every process resolves a reference in this one way."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay_protocol.errors import InvalidModel

DEMO_MODEL_NAME = "kvrelay-demo"
DEMO_MODEL_DIR = Path(__file__).parent / "demo_model"
_TOKENIZER_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
                    "chat_template*", "vocab.json", "merges.txt"]  # fmt: skip
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine's disk."""

    name: str
    directory: Path

    def read_config(self) -> Mapping[str, Any]:
        """config.json, parsed.

        Raises:
            InvalidModel: it is missing or no JSON object.
        """
        path = self.directory / "config.json"
        if not path.is_file():
            raise InvalidModel(
                f"{self.directory} is not a model folder: it has no config.json; "
                "give a Hugging Face model folder or a hub id such as Qwen/Qwen3-0.6B",
            )
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise InvalidModel(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise InvalidModel(f"{path} holds a {type(raw).__name__}, not a JSON object")
        return raw

    def weight_files(self) -> list[Path]:
        """The safetensors files, in name order.

        Raises:
            InvalidModel: there is none.
        """
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise InvalidModel(f"{self.directory} has no *.safetensors weights")
        return files

    def read_ahead(self) -> None:
        """Ask the system to bring the weights into memory while this process imports its libraries.

        A hint: it returns at once, and nothing depends on it.
        """
        for path in self.directory.glob("*.safetensors"):
            with contextlib.suppress(OSError, AttributeError):
                file = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)

    def require_tokenizer(self) -> Path:
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise InvalidModel(
                f"{self.directory} has no tokenizer.json; save the tokenizer in its fast format",
            )
        return path


def resolve_model(
    reference: str | None,
    *,
    revision: str | None = None,
    weights: bool = True,
) -> ModelFiles:
    """Find a model: None is the demo model, an existing path is a folder, anything else a hub id.

    Args:
        reference: folder, hub id (`owner/name`) or None.
        revision: branch, tag or commit of a hub id.
        weights: False fetches only what a tokenizer needs.

    Raises:
        InvalidModel: no such folder, or the hub does not have it or can't be reached.
    """
    if reference is None or reference == DEMO_MODEL_NAME:
        return ModelFiles(DEMO_MODEL_NAME, DEMO_MODEL_DIR)
    path = Path(reference).expanduser()
    if path.exists() or reference.startswith(("/", ".", "~")) or reference.count("/") != 1:
        if not path.is_dir():
            raise InvalidModel(
                f"model folder {reference} does not exist; "
                "give a folder, a hub id such as Qwen/Qwen3-0.6B, or nothing for the demo model",
            )
        return ModelFiles(path.resolve().name, path.resolve())
    return ModelFiles(reference, _fetch_from_hub(reference, revision, weights=weights))


def _fetch_from_hub(reference: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_TOKENIZER_FILES, *(_WEIGHT_FILES if weights else [])]
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidModel(
            f"model {reference}{f'@{revision}' if revision else ''} is neither a folder here nor "
            f"could it be fetched from the hub: {reason}",
        ) from None
