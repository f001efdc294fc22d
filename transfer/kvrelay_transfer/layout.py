"""What two workers must agree on before they exchange blocks, and how KV is cut into messages."""

from dataclasses import dataclass

from kvrelay_protocol.versions import KV_VERSION

_ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
DEFAULT_TARGET_BYTES = 4 * 1024 * 1024
"""Small messages collapse (facts sheet, section 2), big ones expose more of the last group."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape and meaning of one worker's KV blocks; field names are those of the wire message."""

    model_fingerprint: str
    """Digest of the config and of the weights' names, shapes and sizes."""
    dtype: str
    block_size: int
    """Tokens in a block."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    protocol_version: int = KV_VERSION

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"unknown KV dtype {self.dtype!r}; known: {', '.join(_ITEM_BYTES)}")
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of keys and values of one block in one layer."""
        item = _ITEM_BYTES[self.dtype]
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * item

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.num_layers * self.layer_block_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """The KV one message carries: some layers of some logical blocks."""

    layer_start: int
    layer_count: int
    block_first: int
    block_count: int

    def payload_bytes(self, layout: KvLayout) -> int:
        return self.layer_count * self.block_count * layout.layer_block_bytes


def group_layers(layout: KvLayout, blocks: int, target_bytes: int = DEFAULT_TARGET_BYTES) -> int:
    """How many layers of `blocks` blocks go into one message: near the target, at least one."""
    if blocks < 1:
        raise ValueError(f"a message carries at least one block, not {blocks}")
    layers = target_bytes // (blocks * layout.layer_block_bytes)
    return min(max(layers, 1), layout.num_layers)


def split(
    layout: KvLayout,
    layers: range,
    blocks: range,
    max_payload_bytes: int,
    target_bytes: int = DEFAULT_TARGET_BYTES,
) -> list[Piece]:
    """Cut (layers, blocks) into messages, in the order in which prefill finishes them.

    Every (layer, block) pair is in exactly one piece. Layers advance before blocks do, so that the
    messages of an early layer leave while later layers are computed.

    Raises:
        ValueError: not even one block of one layer fits `max_payload_bytes`.
    """
    if max_payload_bytes < layout.layer_block_bytes:
        raise ValueError(
            f"one block of one layer has {layout.layer_block_bytes} bytes, "
            f"a message holds {max_payload_bytes}"
        )
    if not blocks or not layers:
        return []
    per_message = group_layers(layout, len(blocks), min(target_bytes, max_payload_bytes))
    pieces: list[Piece] = []
    for start in range(layers.start, layers.stop, per_message):
        count = min(per_message, layers.stop - start)
        wide = min(max_payload_bytes // (count * layout.layer_block_bytes), len(blocks))
        pieces += [
            Piece(start, count, first, min(wide, blocks.stop - first))
            for first in range(blocks.start, blocks.stop, wide)
        ]
    return pieces
