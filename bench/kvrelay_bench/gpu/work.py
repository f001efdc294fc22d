"""What is measured, and the least a GPU must do for it. No torch here.

The floor of a time is the larger of bytes over bandwidth and operations over the matrix rate, at the
rates measured on the same device. Bytes count each input once and each output once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of the device, measured."""

    bytes_per_s: float
    """Large device-to-device copy, bytes read plus bytes written."""
    flops: float
    """Large bfloat16 matrix product on random data; a multiply-add counts as two."""
    l2_bytes: int

    def floor_s(self, nbytes: float, flops: float = 0.0) -> float:
        return max(nbytes / self.bytes_per_s, flops / self.flops)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads as in Llama 3.1 8B, and the lengths of a batch."""

    name: str
    context_lens: tuple[int, ...]
    new_tokens: int = 1
    """Queries of each sequence; 1 is decode."""
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64
    cache: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return self.new_tokens * len(self.context_lens)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all contexts."""
        row = 2 * self.kv_heads * self.head_dim * ITEM_BYTES[self.cache]
        return sum(self.context_lens) * row

    @property
    def nbytes(self) -> int:
        """Keys and values, queries in, results out."""
        return self.kv_bytes + 2 * self.tokens * self.heads * self.head_dim * 2

    @property
    def flops(self) -> int:
        """Two products of 2 operations for every visible (query, key) pair and dimension."""
        new = self.new_tokens
        pairs = sum(new * length - new * (new - 1) // 2 for length in self.context_lens)
        return 4 * pairs * self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-shaped model with random weights."""

    name: str = "8B"
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    vocabulary: int = 128256

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * 2

    @property
    def step_parameters(self) -> int:
        """What one step reads: all projections and the head, not the embedding's other rows."""
        attention = self.hidden * (2 * self.hidden + 2 * self.kv_heads * self.head_dim)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + (
            self.hidden * self.vocabulary
        )

    def step_bytes(self, batch: int, context: int) -> int:
        return 2 * self.step_parameters + batch * context * self.kv_token_bytes

    def step_flops(self, batch: int, context: int) -> int:
        return 2 * batch * self.step_parameters + self._attention_flops(batch, context)

    def step_floor_s(self, ceilings: Ceilings, batch: int, context: int) -> float:
        """Projections and attention one after the other, each at its own limit."""
        projections = ceilings.floor_s(2 * self.step_parameters, 2 * batch * self.step_parameters)
        kv_bytes = batch * context * self.kv_token_bytes
        return projections + ceilings.floor_s(kv_bytes, self._attention_flops(batch, context))

    def _attention_flops(self, batch: int, context: int) -> int:
        return 4 * batch * context * self.heads * self.head_dim * self.layers

    def hugging_face_config(self) -> dict[str, object]:
        """Contents of a `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """One measurement of whole steps."""

    batch: int
    context: int = 1024
    steps: int = 24


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one run measures, largest claim first."""

    decode: tuple[AttentionShape, ...]
    prefill: tuple[AttentionShape, ...]
    op_rows: tuple[int, ...]
    """Rows of each small op."""
    model: ModelShape
    points: tuple[DecodePoint, ...]
    gemm_rows: tuple[int, ...]
    copy_bytes: int
    gemm_size: int
    warm_ms: float = 50.0
    measure_ms: float = 200.0


_MIXED = (131072, *(4096,) * 31)


def full_plan() -> Plan:
    """The shapes of the design's targets."""
    caches = ("bfloat16", "float8_e4m3fn")
    return Plan(
        decode=tuple(
            AttentionShape(name, lens, cache=cache)
            for name, lens in (
                ("32 x 4k", (4096,) * 32),
                ("1 x 128k + 31 x 4k", _MIXED),
                ("1 x 32k", (32768,)),
                ("128 x 1k", (1024,) * 128),
                ("64 x 128", (128,) * 64),
            )
            for cache in caches
        ),
        prefill=tuple(
            AttentionShape(f"{length // 1024}k causal", (length,), new_tokens=length)
            for length in (8192, 4096, 16384, 1024)
        ),
        op_rows=(1, 32, 256, 8192),
        model=ModelShape(),
        points=(DecodePoint(1), DecodePoint(32), DecodePoint(256)),
        gemm_rows=(1, 32, 256, 4096),
        copy_bytes=4 << 30,
        gemm_size=8192,
    )


def smoke_plan() -> Plan:
    """The same measurements at shapes that a CPU computes in a moment."""
    small: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16, "block_size": 16}
    return Plan(
        decode=(
            AttentionShape("3 x 20", (20,) * 3, **small),
            AttentionShape("1 x 70 + 2 x 9", (70, 9, 9), **small),
        ),
        prefill=(AttentionShape("33 causal", (33,), new_tokens=33, **small),),
        op_rows=(1, 5),
        model=ModelShape("tiny", 64, 2, 4, 2, 96, 300),
        points=(DecodePoint(1, 20, 3), DecodePoint(3, 20, 3)),
        gemm_rows=(1, 4),
        copy_bytes=1 << 20,
        gemm_size=64,
        warm_ms=1.0,
        measure_ms=5.0,
    )


def rotations(nbytes: int, l2_bytes: int) -> int:
    """How many sets of inputs, so that a round through them evicts the first from the cache."""
    return max(1, min(64, math.ceil(4 * l2_bytes / max(nbytes, 1))))


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, or the reason why there is none."""

    part: str
    name: str
    shape: str
    nbytes: float = 0.0
    flops: float = 0.0
    seconds: float | None = None
    """Median time of one call on the device, replayed from a graph where that can be captured."""
    eager_seconds: float | None = None
    """Median of `do_bench`, which includes what the launches cost."""
    floor_seconds: float | None = None
    error: float | None = None
    """Norm of the difference to the float64 reference over the norm of the reference."""
    tolerance: float | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Median seconds of other implementations on the same device and inputs."""
    units_per_s: float | None = None
    """Tokens per second, of whole steps."""
    unmeasured: str | None = None

    @property
    def share(self) -> float | None:
        """Floor over time: 1 is the roofline."""
        if self.seconds is None or self.floor_seconds is None:
            return None
        return self.floor_seconds / self.seconds

    @property
    def wrong(self) -> bool:
        """Whether a check failed; a NaN fails every check."""
        if self.error is None or self.tolerance is None:
            return False
        return not self.error <= self.tolerance

    def to_json(self) -> dict[str, object]:
        return {
            name: getattr(self, name) for name in (*self.__dataclass_fields__, "share", "wrong")
        }

    def cells(self) -> tuple[object, ...]:
        """For the table: microseconds, GB/s, TFLOP/s, % of roofline, best baseline, verdict."""
        if self.seconds is None:
            return (self.part, self.name, self.shape, *(None,) * 6, self.unmeasured or "–")
        best = min(self.baselines.items(), key=lambda item: item[1], default=None)
        share = self.share
        return (
            self.part,
            self.name,
            self.shape,
            self.seconds * 1e6,
            self.nbytes / self.seconds / 1e9 if self.nbytes else None,
            self.flops / self.seconds / 1e12 if self.flops else None,
            None if share is None else f"{share:.0%}",
            self.units_per_s,
            None if best is None else f"{best[1] / self.seconds:.2f}x {best[0]}",
            "WRONG" if self.wrong else "ok" if self.error is not None else "–",
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A measurement that has yet to be made, so that one that fails costs only its own row."""

    part: str
    name: str
    shape: str
    run: Callable[[], Row]

    def without(self, reason: str) -> Row:
        """The row of a measurement that there is not."""
        return Row(self.part, self.name, self.shape, unmeasured=reason)


HEADER = ("part", "what", "shape", "us", "GB/s", "TFLOP/s", "of roofline", "tok/s",
          "speed against", "check")  # fmt: skip
