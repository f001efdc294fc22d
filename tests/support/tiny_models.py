"""Tiny random-weight models of every supported family, and what transformers generates with them."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BYTES = 256
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 320
CLEAR_MARGIN = 1e-3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    # Far above the usual 0.02: the logits of different tokens are then far apart, so that float
    # rounding cannot change a greedy choice.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2_5": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}

FAMILIES = tuple(_FAMILIES)
SHARDED_FAMILIES = ("qwen3",)


def build_tiny_model(
    family: str, path: Path, *, vocab_size: int = VOCAB_SIZE, seed: int = 0, **overrides: Any
) -> Path:
    """Write a Hugging Face folder: config, float32 safetensors, tokenizer with a chat template.

    `overrides` are further configuration fields, such as `attention_bias=True`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name, fields = _FAMILIES[family]
    tokenizer = tiny_tokenizer()
    if vocab_size < len(tokenizer):
        raise ValueError(f"the tokenizer needs a vocabulary of {len(tokenizer)}")
    config = getattr(transformers, f"{name}Config")(
        **{
            **_SHAPE,
            "vocab_size": vocab_size,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            **fields,
            **overrides,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
        _perturb_biases_and_norms(model)
    # A shard of 100 kB splits every tiny model into several files.
    shard = "100KB" if family in SHARDED_FAMILIES else "1GB"
    model.save_pretrained(path, max_shard_size=shard)
    tokenizer.save_pretrained(path)
    return Path(path)


@functools.cache
def tiny_model(
    family: str, *, vocab_size: int = VOCAB_SIZE, seed: int = 0, **overrides: Any
) -> Path:
    """A tiny model built once a test process; its folder goes when the process does."""
    folder = tempfile.mkdtemp(prefix=f"kvrelay-tiny-{family}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_tiny_model(family, Path(folder), vocab_size=vocab_size, seed=seed, **overrides)


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer: 256 bytes, a few merges, three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "the"), ("e", "r"), ("o", "n")]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=_SHAPE["max_position_embeddings"],
    )


def reference_generate(
    path: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, ignore_eos: bool = True
) -> list[list[int]]:
    """Greedy tokens of transformers `generate`, float32, eager attention, one prompt at a time.

    With `ignore_eos=False` a sequence ends with its end token, which is included.
    """
    return [
        _generate(Path(path), prompt, max_new_tokens, ignore_eos=ignore_eos)[0]
        for prompt in prompts
    ]


@functools.cache
def reference_chat(path: Path, question: str, max_new_tokens: int) -> tuple[list[int], str]:
    """Prompt tokens of a chat with one message, and the greedy text transformers answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    (tokens,) = reference_generate(path, [prompt], max_new_tokens)
    return prompt, tokenizer.decode(tokens, skip_special_tokens=True)


@functools.cache
def clear_case(
    path: Path, length: int, max_new_tokens: int, *, seed: int = 0, ignore_eos: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt of this length and its greedy tokens, none of which is a close call.

    Float rounding moves logits by up to about 2e-5 between one batch and another. Over thousands of
    tokens some choice is closer than that, and a test that compares tokens would fail now and then
    for no fault; prompts whose two best logits ever come within `CLEAR_MARGIN` are passed over.
    """
    for attempt in range(100):
        prompt = random_prompt(length, seed=seed + 1000 * attempt)
        tokens, margin = _generate(Path(path), prompt, max_new_tokens, ignore_eos=ignore_eos)
        if margin >= CLEAR_MARGIN:
            return tuple(prompt), tuple(tokens)
    raise AssertionError(f"no clear prompt of {length} tokens")


def reference_logits(path: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of transformers at every position, `[tokens, vocabulary]` float32."""
    with torch.inference_mode():
        return _reference_model(Path(path))(torch.tensor([list(tokens)])).logits[0]


def random_prompt(length: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """A prompt of ordinary tokens, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed * 100_003 + length)
    return torch.randint(0, min(BYTES, vocab_size), (length,), generator=generator).tolist()


def _generate(
    path: Path, prompt: Sequence[int], max_new_tokens: int, *, ignore_eos: bool
) -> tuple[list[int], float]:
    """Greedy tokens, and the smallest lead of a chosen logit over the next."""
    from transformers import GenerationConfig

    model = _reference_model(path)
    # Set on the model too, whose own settings would fill in an end token that is left out.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None if ignore_eos else model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = torch.tensor([list(prompt)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids))
    best = torch.cat(output.logits).topk(2).values
    return output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).min().item()


@functools.cache
def _reference_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def _perturb_biases_and_norms(model: torch.nn.Module) -> None:
    """Fresh models have zero biases and unit norms, which would hide a decoder that ignores them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
