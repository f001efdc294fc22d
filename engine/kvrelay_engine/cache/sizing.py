"""How many bytes a KV pool takes. No torch here: schedulers and start-up checks use it too."""

from kvrelay_engine.models.config import ModelConfig


def kv_bytes_per_block(config: ModelConfig, block_size: int, dtype_bytes: int) -> int:
    """Bytes of one block over all layers: keys and values of `block_size` tokens."""
    per_token = 2 * config.num_kv_heads * config.head_dim * dtype_bytes
    return config.num_layers * block_size * per_token
