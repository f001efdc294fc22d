"""The network: a small Llama, and its training forward pass and loss."""

from typing import Final

import torch
from dialogue import MAX_POSITIONS, SPECIAL_TOKENS, Row
from tokenizer import VOCABULARY_SIZE
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

PAD_ID, BOS_ID, END_ID = (SPECIAL_TOKENS.index(t) for t in ("<|pad|>", "<|bos|>", "<|end|>"))

CONFIG: Final = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.03,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": END_ID,
}


def build() -> LlamaForCausalLM:
    """A freshly initialised float32 model; greedy decoding is its default."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=BOS_ID, eos_token_id=END_ID, pad_token_id=PAD_ID
    )
    return model


def hidden_states(model: LlamaForCausalLM, ids: Tensor, positions: Tensor) -> Tensor:
    """Final hidden states [rows, length, hidden] under a plain causal mask.

    The layers are called one by one because the library's own forward pass reads a jump in the
    positions as the start of another document and would hide the earlier turns.
    """
    body = model.model
    hidden: Tensor = body.embed_tokens(ids)
    rotary = body.rotary_emb(hidden, positions)
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    normed: Tensor = body.norm(hidden)
    return normed


def answer_loss(model: LlamaForCausalLM, rows: list[Row]) -> Tensor:
    """Mean cross entropy (nats per token) over the learned tokens only."""
    ids = torch.tensor([row.ids for row in rows])
    learned = torch.tensor([row.learned for row in rows])[:, 1:]
    positions = torch.tensor([row.positions for row in rows])
    hidden = hidden_states(model, ids, positions)[:, :-1][learned]
    logits: Tensor = model.lm_head(hidden)
    return functional.cross_entropy(logits, ids[:, 1:][learned])
