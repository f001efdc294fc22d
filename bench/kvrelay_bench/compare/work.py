"""How much a point asks of the machine, and the time it can't be done faster than."""

from dataclasses import dataclass

from kvrelay_bench.compare.points import Point
from kvrelay_bench.machine import Limits
from kvrelay_bench.models import ModelShape

WEIGHT_BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "int8": 1.0, "q8_0": 34 / 32}
"""Bytes of a weight; Q8_0 has a 2-byte scale for every 32."""
_KV_BYTES = 2
"""16-bit keys and values in every engine."""


@dataclass(frozen=True, slots=True)
class Work:
    """Least bytes read and operations done; a multiply-add counts as two operations.

    A step reads every weight of the layers and of the head once and the keys and values of all its
    sequences once; activations stay in the caches. The head runs once per generated token.
    """

    prefill_bytes: float
    prefill_flops: float
    decode_bytes: float
    decode_flops: float

    @property
    def bytes(self) -> float:
        return self.prefill_bytes + self.decode_bytes

    @property
    def flops(self) -> float:
        return self.prefill_flops + self.decode_flops

    def floor_s(self, limits: Limits) -> float:
        """Seconds at the machine's limits: each phase is bound by its bytes or its operations."""
        return max(
            self.prefill_bytes / limits.read_bytes_per_s, self.prefill_flops / limits.product_flops
        ) + max(
            self.decode_bytes / limits.read_bytes_per_s, self.decode_flops / limits.product_flops
        )


def work_of(point: Point, shape: ModelShape, weight_bytes: float) -> Work:
    """Work of one call: the prefill of all prompts, then `output_len - 1` steps.

    Attention costs `4 * heads * head_dim` operations for each pair of a query and a key it sees
    (scores and values), so the prefill of n tokens has n * (n + 1) / 2 pairs a sequence.
    """
    layers = shape.num_layers * shape.layer_parameters
    head = shape.hidden_size * shape.vocab_size
    read = shape.linear_parameters * weight_bytes
    pair = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim
    steps = point.output_len - 1
    # Step i of a sequence sees its prompt, i generated tokens and itself.
    seen = sum(point.input_len + step for step in range(1, steps + 1)) * point.batch
    prompt_pairs = point.batch * point.input_len * (point.input_len + 1) / 2
    prompt_tokens = point.batch * point.input_len
    return Work(
        prefill_bytes=read,
        prefill_flops=2.0 * (layers * prompt_tokens + head * point.batch) + pair * prompt_pairs,
        decode_bytes=steps * read + seen * shape.kv_values_per_token * _KV_BYTES,
        decode_flops=2.0 * (layers + head) * point.batch * steps + pair * seen,
    )
