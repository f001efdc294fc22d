"""The KV that is moved: blocks of the 0.5b benchmark model, without the model."""

import torch

from kvrelay_bench.models import MODELS
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.models.config import parse_model_config
from kvrelay_protocol.errors import UsageError
from kvrelay_transfer.layout import KvLayout, Piece

BLOCK_SIZE = 16
"""Tokens in a block."""
_SHAPE = MODELS["0.5b"]
_MAX_BLOCKS = 256
"""Blocks of one message, those of a 4k prompt; larger messages take more layers."""

LAYOUT = KvLayout(
    model_fingerprint="benchmark",
    dtype="bfloat16",
    block_size=BLOCK_SIZE,
    num_layers=_SHAPE.num_layers,
    num_kv_heads=_SHAPE.num_kv_heads,
    head_dim=_SHAPE.head_dim,
)


def piece_of(size: int) -> Piece:
    """Layers and blocks whose KV has `size` bytes.

    Raises:
        UsageError: no number of layers and blocks has this size.
    """
    unit, rest = LAYOUT.layer_block_bytes, size % LAYOUT.layer_block_bytes
    parts = size // unit
    fitting = (
        (parts // blocks, blocks)
        for blocks in range(min(_MAX_BLOCKS, parts), 0, -1)
        if parts % blocks == 0 and parts // blocks <= LAYOUT.num_layers
    )
    found = None if rest else next(fitting, None)
    if found is None:
        raise UsageError(
            f"--size {size}: messages hold whole blocks of {unit} bytes, up to {_MAX_BLOCKS} of them "
            f"in up to {LAYOUT.num_layers} layers; take a multiple of {unit} such as {max(parts, 1) * unit}"
        )
    return Piece(0, found[0], 0, found[1] * BLOCK_SIZE)


def make_pool(num_blocks: int, *, seed: int | None = None) -> KVPool:
    """A pool of `LAYOUT`; its content is random for a seed, else zero."""
    config = parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": _SHAPE.hidden_size,
            "intermediate_size": _SHAPE.intermediate_size,
            "num_hidden_layers": _SHAPE.num_layers,
            "num_attention_heads": _SHAPE.num_heads,
            "num_key_value_heads": _SHAPE.num_kv_heads,
            "head_dim": _SHAPE.head_dim,
            "vocab_size": _SHAPE.vocab_size,
            "max_position_embeddings": _SHAPE.max_positions,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
        }
    )
    pool = KVPool(
        config,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        words = pool.tensor.view(torch.int16)
        words.random_(-(2**15), 2**15 - 1, generator=generator)
    return pool


def shuffled_blocks(count: int, num_blocks: int, *, seed: int) -> tuple[int, ...]:
    """Distinct physical blocks in no order, as a pool that has been in use gives them."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(num_blocks, generator=generator)[:count].tolist())
