"""Which files are a model, and where they are: every process resolves a reference in this one way."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.weights.header import Header, read_header
from kvrelay_protocol.weights.local import LocalWeights
from kvrelay_protocol.weights.peer import FindPeer
from kvrelay_protocol.weights.source import WeightSource
from kvrelay_protocol.weights.stream import StreamOptions

if TYPE_CHECKING:
    from kvrelay_protocol.weights.pin import PinnedModel

DEMO_MODEL_NAME = "kvrelay-demo"
DEMO_MODEL_DIR = Path(__file__).parent / "demo_model"
_TOKENIZER_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
                    "chat_template*", "vocab.json", "merges.txt"]  # fmt: skip
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
MODEL_FILES = (*_TOKENIZER_FILES, *_WEIGHT_FILES)
"""Names of everything that makes a model."""
_S3 = "s3://"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model whose files are on this machine's disk, or all but the weights' data."""

    name: str
    directory: Path
    remote: "PinnedModel | None" = None
    """Where the data is, if not in the directory."""

    @property
    def reference(self) -> str:
        """What another process is told to find the same model."""
        return str(self.directory) if self.remote is None else str(self.remote.location)

    @property
    def revision(self) -> str | None:
        """What another process must be told beside it; None: the folder says it all."""
        return None if self.remote is None else self.remote.revision

    def headers(self) -> Mapping[str, Header]:
        """Of every weight file, by name.

        Raises:
            InvalidModel: there is none, or one is damaged.
        """
        if self.remote is None:
            return {path.name: read_header(path) for path in self.weight_files()}
        headers = self.remote.headers()
        if not headers:
            raise InvalidModel(f"{self.reference} has no *.safetensors weights")
        return headers

    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        if self.remote is None:
            return sum(path.stat().st_size for path in self.weight_files())
        objects = self.remote.objects.items()
        return sum(item.size for name, item in objects if name.endswith(".safetensors"))

    def open_weights(
        self, options: StreamOptions | None = None, find_peer: FindPeer | None = None
    ) -> WeightSource:
        """The weights to read; what is not on this machine begins to arrive.

        Args:
            options: how.
            find_peer: asks for another worker to take remote ones from; None: the store has them all.

        Raises:
            InvalidModel: they are incomplete, or a file is damaged.
        """
        options = options or StreamOptions()
        if self.remote is not None:
            return self.remote.stream(options, find_peer)
        source = LocalWeights(self.directory, link_bytes_per_s=options.link_bytes_per_s)
        self.read_ahead()
        return source

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
    """Find a model: None is the demo model, s3:// a bucket, an existing path a folder, else a hub id.

    Args:
        reference: folder, hub id (`owner/name`), `s3://bucket/prefix` or None.
        revision: branch, tag or commit of a hub id; of a model in S3, what an earlier start called it.
        weights: False fetches only what a tokenizer needs. The data of weights in S3 is never fetched
            here: see `ModelFiles.open_weights`.

    Raises:
        InvalidModel: no such folder, or the hub does not have it or can't be reached.
    """
    if reference is None or reference == DEMO_MODEL_NAME:
        return ModelFiles(DEMO_MODEL_NAME, DEMO_MODEL_DIR)
    if reference.startswith(_S3):
        return _pin_in_s3(reference, revision)
    path = Path(reference).expanduser()
    if not is_hub_id(reference):
        if not path.is_dir():
            raise InvalidModel(
                f"model folder {reference} does not exist; "
                "give a folder, a hub id such as Qwen/Qwen3-0.6B, or nothing for the demo model",
            )
        return ModelFiles(path.resolve().name, path.resolve())
    return ModelFiles(reference, _fetch_from_hub(reference, revision, weights=weights))


def is_hub_id(reference: str) -> bool:
    """Whether a reference is neither the demo model, a bucket nor a folder, but `owner/name`."""
    elsewhere = reference.startswith((_S3, "/", ".", "~")) or Path(reference).exists()
    return reference.count("/") == 1 and not elsewhere


def _pin_in_s3(reference: str, revision: str | None) -> ModelFiles:
    # Imported here: who serves a local model needs no boto3.
    from kvrelay_protocol.weights.pin import pin_model

    pinned = pin_model(reference, revision, MODEL_FILES)
    return ModelFiles(pinned.location.name, pinned.directory, pinned)


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
