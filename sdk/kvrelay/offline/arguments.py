"""Parameters that vLLM has and this engine has not: accepted while they ask for nothing, refused after."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar

from kvrelay_protocol.errors import InvalidRequest, KvrelayError, UsageError


@dataclass(frozen=True, slots=True)
class Unsupported:
    """One parameter of vLLM's."""

    neutral: tuple[object, ...]
    """Values that change nothing here."""
    fix: str


_DROP = "leave it out"

SAMPLING: Mapping[str, Unsupported] = {
    "allowed_token_ids": Unsupported((None,), _DROP),
    "bad_words": Unsupported((None, [], ()), _DROP),
    "best_of": Unsupported((None, 1), "use n and choose by cumulative_logprob"),
    "early_stopping": Unsupported((None, False), "beam search is not supported; sample with n"),
    "extra_args": Unsupported((None,), _DROP),
    "flat_logprobs": Unsupported((False,), "read the list of dicts in logprobs"),
    "guided_decoding": Unsupported((None,), "ask for the format in the prompt"),
    "length_penalty": Unsupported((None, 1.0), "beam search is not supported; sample with n"),
    "logit_bias": Unsupported((None, {}), _DROP),
    "logits_processors": Unsupported((None, [], ()), _DROP),
    "output_kind": Unsupported((None,), "generate() returns complete answers"),
    "prompt_logprobs": Unsupported((None,), "logprobs reports those of the answer"),
    "repetition_detection": Unsupported((None,), "use repetition_penalty"),
    "skip_reading_prefix_cache": Unsupported((None, False), "LLM(enable_prefix_caching=False)"),
    "spaces_between_special_tokens": Unsupported((None, True, False), _DROP),
    "structured_outputs": Unsupported((None,), "ask for the format in the prompt"),
    "truncate_prompt_tokens": Unsupported((None,), "cut the prompt's token ids yourself"),
    "use_beam_search": Unsupported((None, False), "sample with n"),
}

_ONE_DEVICE = "this engine runs on one device; start one process for each"
_KV_DTYPE = "the KV cache has the model's dtype"

ENGINE: Mapping[str, Unsupported] = {
    "allowed_local_media_path": Unsupported((None, ""), _DROP),
    "config_format": Unsupported((None, "auto", "hf"), "Hugging Face folders are read"),
    "cpu_offload_gb": Unsupported((None, 0), "lower kv_cache_memory_bytes or use a smaller model"),
    "data_parallel_size": Unsupported((None, 1), _ONE_DEVICE),
    "disable_custom_all_reduce": Unsupported((None, True, False), _DROP),
    "disable_log_stats": Unsupported((None, True, False), _DROP),
    "distributed_executor_backend": Unsupported((None, "uni"), _ONE_DEVICE),
    "enable_chunked_prefill": Unsupported((None, True), "prompts are always chunked"),
    "enable_lora": Unsupported((None, False), "merge the adapter into the checkpoint"),
    "enforce_eager": Unsupported((None, True, False), _DROP),
    "generation_config": Unsupported((None, "auto"), "pass SamplingParams to generate()"),
    "hf_overrides": Unsupported((None, {}), "change config.json in the model folder"),
    "hf_token": Unsupported((None,), "set HF_TOKEN in the environment"),
    "kv_cache_dtype": Unsupported((None, "auto"), _KV_DTYPE),
    "limit_mm_per_prompt": Unsupported((None, {}), "text models run here"),
    "load_format": Unsupported((None, "auto", "safetensors"), "safetensors checkpoints are read"),
    "max_seq_len_to_capture": Unsupported((None, 8192), _DROP),
    "pipeline_parallel_size": Unsupported((None, 1), _ONE_DEVICE),
    "runner": Unsupported((None, "auto", "generate"), "this engine generates text"),
    "speculative_config": Unsupported((None,), _DROP),
    "swap_space": Unsupported((None, 0, 4, 4.0), "preempted sequences are computed again"),
    "task": Unsupported((None, "auto", "generate"), "this engine generates text"),
    "tensor_parallel_size": Unsupported((None, 1), _ONE_DEVICE),
    "tokenizer_mode": Unsupported((None, "auto", "hf"), "tokenizer.json is read"),
    "trust_remote_code": Unsupported(
        (None, False), "no code of a checkpoint is run; Llama, Mistral and Qwen folders work"
    ),
}

CALL: Mapping[str, Unsupported] = {
    "chat_template_content_format": Unsupported((None, "auto", "string"), _DROP),
    "chat_template_kwargs": Unsupported(
        (None, {}), "render with chat_template=, or use generate()"
    ),
    "continue_final_message": Unsupported((None, False), "render the prompt and use generate()"),
    "lora_request": Unsupported((None,), "merge the adapter into the checkpoint"),
    "mm_processor_kwargs": Unsupported((None, {}), "text models run here"),
    "priority": Unsupported((None, [], ()), "prompts run in their order"),
    "tools": Unsupported((None, [], ()), "describe the tools in a message"),
}

ClassT = TypeVar("ClassT", bound=type[Any])


def refuse(
    given: Mapping[str, object],
    *,
    owner: str,
    known: Iterable[str],
    unsupported: Mapping[str, Unsupported],
    error: type[KvrelayError],
) -> None:
    """Check arguments that `owner` does not have.

    Raises:
        KvrelayError: of type `error`, for a parameter of vLLM's that asks for something.
        TypeError: nobody knows the name; the nearest is in the message.
    """
    for name, value in given.items():
        entry = unsupported.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see docs/sdk.md for what it takes"
            raise TypeError(f"{owner} has no parameter {name!r}; {hint}")
        if not any(_same(value, item) for item in entry.neutral):
            raise error(
                f"{owner}: {name}={_short(value)} is not supported; {entry.fix}", param=name
            )


def refuse_engine_arguments(given: Mapping[str, object], known: Iterable[str]) -> None:
    """`refuse` for the arguments of `LLM`."""
    refuse(given, owner="LLM", known=known, unsupported=ENGINE, error=UsageError)


def refuse_call_arguments(given: Mapping[str, object], call: str, known: Iterable[str]) -> None:
    """`refuse` for the arguments of `LLM.generate` and `LLM.chat`."""
    refuse(given, owner=f"LLM.{call}", known=known, unsupported=CALL, error=InvalidRequest)


def refuses_sampling_arguments(cls: ClassT) -> ClassT:
    """Let a dataclass of sampling parameters take what it has no field for as `refuse` allows."""
    construct: Callable[..., None] = cls.__init__
    known = [entry.name for entry in fields(cls)]

    @wraps(construct)
    def init(self: object, *args: object, **given: object) -> None:
        if args:
            raise TypeError(f"{cls.__name__} takes keyword arguments only, such as n=1")
        other = {name: given.pop(name) for name in list(given) if name not in known}
        refuse(
            other,
            owner=cls.__name__,
            known=known,
            unsupported=SAMPLING,
            error=InvalidRequest,
        )
        construct(self, **given)

    cls.__init__ = init
    return cls


def _same(value: object, neutral: object) -> bool:
    # 1 equals True, but does not mean it.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
