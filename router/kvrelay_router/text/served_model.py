"""Everything the router knows about the model it serves; read once from its folder."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay_protocol.errors import InvalidModel
from kvrelay_protocol.model_files import ModelFiles
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_router.text.chat_template import ChatTemplate
from kvrelay_router.text.tokenizer import Tokenizer, load_tokenizer, named_tokens, read_json

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model behind this router."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None where the folder has none: chat requests are then refused."""
    max_model_len: int
    """Tokens of prompt and answer together."""
    vocab_size: int
    """Ids below it may be sent as a prompt."""
    eos_token_ids: frozenset[int]
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)
    """What a request that names nothing gets: generation_config.json's values."""
    created: int = field(default_factory=lambda: int(time.time()))


def load_served_model(directory: Path, name: str) -> ServedModel:
    """Read tokenizer, template and limits from a model folder.

    Raises:
        InvalidModel: a file is missing or can't be read.
    """
    files = ModelFiles(name, directory)
    config = files.read_config()
    tokenizer = load_tokenizer(files.require_tokenizer())
    tokenizer_config = read_json(directory / "tokenizer_config.json")
    generation = read_json(directory / "generation_config.json")
    named = named_tokens(tokenizer_config)
    source = _template_source(directory, tokenizer_config)
    return ServedModel(
        name=name,
        tokenizer=tokenizer,
        template=None if source is None else ChatTemplate(source, named),
        max_model_len=_context_length(config, directory),
        vocab_size=_vocab_size(config, tokenizer),
        eos_token_ids=_eos_ids(config, generation, named, tokenizer),
        sampling_defaults=_sampling_defaults(generation),
    )


def _template_source(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The newest of the three places wins: chat_template.jinja, chat_template.json, the config."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text()
    raw = read_json(directory / "chat_template.json").get("chat_template")
    raw = raw if raw is not None else tokenizer_config.get("chat_template")
    if isinstance(raw, list):  # several named templates
        named = {
            entry.get("name"): entry.get("template") for entry in raw if isinstance(entry, dict)
        }
        raw = named.get("default")
    return raw if isinstance(raw, str) else None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _context_length(config: Mapping[str, Any], directory: Path) -> int:
    for key in _CONTEXT_KEYS:
        value = _text_config(config).get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise InvalidModel(f"{directory / 'config.json'} names no context length ({_CONTEXT_KEYS[0]})")


def _vocab_size(config: Mapping[str, Any], tokenizer: Tokenizer) -> int:
    value = _text_config(config).get("vocab_size")
    return value if isinstance(value, int) and value > 0 else tokenizer.vocab_size


def _eos_ids(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    named: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> frozenset[int]:
    """Every id that ends an answer: all of the files' opinions together."""
    ids: set[int] = set()
    for raw in (generation.get("eos_token_id"), _text_config(config).get("eos_token_id")):
        ids.update(i for i in (raw if isinstance(raw, list) else [raw]) if type(i) is int)
    own = tokenizer.token_id(named["eos_token"]) if "eos_token" in named else None
    return frozenset(ids if own is None else {*ids, own})


def _sampling_defaults(generation: Mapping[str, Any]) -> SamplingParams:
    """generation_config.json's values where they are in range, this API's defaults elsewhere."""
    fallback = SamplingParams()
    top_k = generation.get("top_k")
    top_p = _number(generation, "top_p", fallback.top_p, 0.0, 1.0)
    return SamplingParams(
        temperature=_number(generation, "temperature", fallback.temperature, 0.0, 2.0),
        top_k=top_k if type(top_k) is int and top_k > 0 else fallback.top_k,
        top_p=top_p or fallback.top_p,
        min_p=_number(generation, "min_p", fallback.min_p, 0.0, 1.0),
    )


def _number(raw: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return float(value) if low <= value <= high else default
