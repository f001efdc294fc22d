"""What two workers must agree on before they exchange KV, where they may differ, and how KV is cut up.

On the wire KV is named by layers, positions in the sequence (tokens) and heads of the model, never by
anyone's blocks. The payload of a frame is

    [layers, 2 (keys, values), blocks, block_tokens, heads, head_dim]

row-major and little-endian, in the receiver's dtype. Between workers whose blocks are alike a block of
the wire is a block of theirs, the last one padded with zeros, and nothing is converted. Between others it
is a single token: a layout that neither side has, and both can address.
"""

from dataclasses import dataclass

from kvrelay_protocol.errors import LayoutMismatch
from kvrelay_protocol.versions import KV_VERSION

_ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
DTYPE_CODES = {name: code for code, name in enumerate(_ITEM_BYTES, start=1)}
"""How a frame's header names a dtype."""
MUST_BE_EQUAL = (
    "model_fingerprint",
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "protocol_version",
)
"""Of two layouts that exchange KV; dtype, block size and tensor parallelism may differ."""
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
    """Of the model; these blocks hold those in `heads`."""
    head_dim: int
    protocol_version: int = KV_VERSION
    tensor_parallel: int = 1
    """Workers that share the heads of one sequence, in equal parts."""
    tensor_rank: int = 0
    """Which part these blocks hold, counted from 0."""

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"unknown KV dtype {self.dtype!r}; known: {', '.join(_ITEM_BYTES)}")
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_kv_heads % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} does not divide {self.num_kv_heads} KV heads"
            )
        if not 0 <= self.tensor_rank < self.tensor_parallel:
            raise ValueError(f"tensor_rank {self.tensor_rank} of {self.tensor_parallel}")

    @property
    def heads(self) -> range:
        """The model's KV heads that these blocks hold."""
        part = self.num_kv_heads // self.tensor_parallel
        return range(self.tensor_rank * part, (self.tensor_rank + 1) * part)

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of keys and values of one token in one layer."""
        return 2 * len(self.heads) * self.head_dim * _ITEM_BYTES[self.dtype]

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of keys and values of one block in one layer."""
        return self.block_size * self.layer_token_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.num_layers * self.layer_block_bytes

    def check_exchange(self, other: "KvLayout") -> None:
        """Raise LayoutMismatch unless KV of one can be used by the other."""
        for name in MUST_BE_EQUAL:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise LayoutMismatch(
                    f"kv_layout.{name}: this worker has {mine!r}, its peer {theirs!r}"
                )


@dataclass(frozen=True, slots=True)
class Piece:
    """The KV one message carries: some layers of some positions of a sequence."""

    layer_start: int
    layer_count: int
    token_start: int
    token_count: int

    @property
    def layer_end(self) -> int:
        return self.layer_start + self.layer_count

    @property
    def tokens(self) -> range:
        return range(self.token_start, self.token_start + self.token_count)

    @property
    def size(self) -> int:
        """Tokens times layers."""
        return self.layer_count * self.token_count

    def overlaps(self, other: "Piece") -> bool:
        """Whether some token of some layer is in both."""
        in_layers = self.layer_start < other.layer_end and other.layer_start < self.layer_end
        return in_layers and (
            self.token_start < other.tokens.stop and other.token_start < self.tokens.stop
        )


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How the payloads of one transfer are laid out; see the module."""

    dtype: str
    block_tokens: int
    """Tokens in a block of the wire: those of both sides' blocks, or 1."""
    heads: range
    head_dim: int

    @classmethod
    def between(cls, sender: KvLayout, receiver: KvLayout) -> "WireFormat":
        """What `sender` writes for `receiver`: the heads that both hold, in the receiver's dtype.

        Raises:
            LayoutMismatch: they describe different models, or have no head in common.
        """
        sender.check_exchange(receiver)
        first = max(sender.heads.start, receiver.heads.start)
        heads = range(first, min(sender.heads.stop, receiver.heads.stop))
        if not heads:
            raise LayoutMismatch(
                f"kv_layout.tensor_rank: this worker holds heads {sender.heads.start} to "
                f"{sender.heads.stop}, its peer {receiver.heads.start} to {receiver.heads.stop}"
            )
        alike = ("dtype", "block_size", "heads")
        same = all(getattr(sender, name) == getattr(receiver, name) for name in alike)
        size = receiver.block_size if same else 1
        return cls(receiver.dtype, size, heads, receiver.head_dim)

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of keys and values of one token in one layer."""
        return 2 * len(self.heads) * self.head_dim * _ITEM_BYTES[self.dtype]

    def layer_bytes(self, tokens: int) -> int:
        """Bytes of `tokens` tokens in one layer, the last block padded."""
        blocks = -(-tokens // self.block_tokens)
        return blocks * self.block_tokens * self.layer_token_bytes

    def payload_bytes(self, piece: Piece) -> int:
        """Size of the payload that carries `piece`."""
        return piece.layer_count * self.layer_bytes(piece.token_count)


def group_layers(layout: KvLayout, tokens: int, target_bytes: int = DEFAULT_TARGET_BYTES) -> int:
    """How many layers of `tokens` tokens go into one message: near the target, at least one."""
    if tokens < 1:
        raise ValueError(f"a message carries at least one token, not {tokens}")
    blocks = -(-tokens // layout.block_size)
    layers = target_bytes // (blocks * layout.layer_block_bytes)
    return min(max(layers, 1), layout.num_layers)


def split(
    wire: WireFormat,
    layers: range,
    tokens: range,
    max_payload_bytes: int,
    target_bytes: int = DEFAULT_TARGET_BYTES,
) -> list[Piece]:
    """Cut (layers, tokens) into messages, in the order in which prefill finishes them.

    Every (layer, token) pair is in exactly one piece, and every piece begins where `tokens` does or whole
    blocks of the wire later. Layers advance before tokens do, so that the messages of an early layer leave
    while later layers are computed.

    Raises:
        ValueError: not even one block of one layer fits `max_payload_bytes`.
    """
    block_bytes = wire.layer_bytes(1)
    if max_payload_bytes < block_bytes:
        raise ValueError(
            f"one block of one layer has {block_bytes} bytes, a message holds {max_payload_bytes}"
        )
    if not tokens or not layers:
        return []
    per_layer = wire.layer_bytes(len(tokens))
    per_message = max(1, min(target_bytes, max_payload_bytes) // per_layer)
    pieces: list[Piece] = []
    for start in range(layers.start, layers.stop, per_message):
        count = min(per_message, layers.stop - start)
        wide = max_payload_bytes // (count * block_bytes) * wire.block_tokens
        pieces += [
            Piece(start, count, first, min(wide, tokens.stop - first))
            for first in range(tokens.start, tokens.stop, wide)
        ]
    return pieces
