"""A checkpoint's bytes again, from the tensors that a model computes with.

On a GPU projections lie as rows of the checkpoint's tensors, stacked; on a CPU in tiles of 32 rows. Either
way bytes come back row by row, without a second copy of anything. They are the checkpoint's only where
nothing was rounded: not for int8, nor for bfloat16 on a CPU that multiplies it as 16-bit integers.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kvrelay_engine.models.config import ModelConfig
from kvrelay_engine.models.decoder import DecoderWeights, LayerWeights
from kvrelay_engine.models.weights import STORED_DTYPES, Part, layer_plan, outer_parts
from kvrelay_kernels.linear import LinearWeights
from kvrelay_protocol.weights.header import StoredTensor
from kvrelay_protocol.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where one checkpoint tensor's rows are now."""

    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]
    """Rows `first` to `end` of it; a vector has rows of one element."""


@dataclass(frozen=True, slots=True)
class _Span:
    """One tensor of a file."""

    start: int
    end: int
    row_bytes: int
    dtype: torch.dtype
    name: str


class ResidentWeights:
    """Reads a loaded model as files; any thread may, as weights never change. Holds none of them: a model
    that sleeps has moved them, and the device's memory is to be free then.
    """

    def __init__(
        self, weights: Callable[[], DecoderWeights], config: ModelConfig, source: WeightSource
    ) -> None:
        """Args:
        weights: where what `source` was loaded into is now, on any device.
        config: of the model.
        source: the checkpoint; only its headers are used.
        """
        self.rounded = ""
        """The first tensor that is no longer what the checkpoint has; empty: all are."""
        self._identity = source.identity
        self._spans: dict[str, list[_Span]] = {}
        self._weights, self._config = weights, config
        held = weights()
        self._stream = _copy_stream(held.embedding.device)
        for part, origin in _origins(held, config):
            self._add(part.name, source.tensors[part.name], origin)
        for spans in self._spans.values():
            spans.sort(key=lambda span: span.start)
        self._starts = {file: [span.start for span in held] for file, held in self._spans.items()}

    def _add(self, name: str, stored: StoredTensor, origin: _Origin) -> None:
        dtype = STORED_DTYPES[stored.dtype]
        # Only a wider format has every number of the checkpoint's.
        if torch.promote_types(dtype, origin.dtype) != origin.dtype:
            self.rounded = self.rounded or f"{name}, {stored.dtype} as {origin.dtype}"
        row = (stored.shape[-1] if len(stored.shape) > 1 else 1) * dtype.itemsize
        span = _Span(stored.start, stored.end, row, dtype, name)
        self._spans.setdefault(stored.file, []).append(span)

    @property
    def identity(self) -> str:
        """Of exactly these bytes; empty where they are the checkpoint's no more."""
        return "" if self.rounded else self._identity

    def has(self, file: str, start: int, end: int) -> bool:
        """Whether these bytes of a file can be read."""
        covered = start
        for span in self._between(file, start, end):
            if span.start > covered:
                return False
            covered = span.end
        return not self.rounded and covered >= end

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on, which `has` them."""
        end = start + len(into)
        origins = {part.name: origin for part, origin in _origins(self._weights(), self._config)}
        for span in self._between(file, start, end):
            low, high = max(start, span.start), min(end, span.end)
            into[low - start : high - start] = self._bytes(
                span, origins[span.name], low - span.start, high - span.start
            )

    def _between(self, file: str, start: int, end: int) -> Iterator[_Span]:
        spans = self._spans.get(file, [])
        first = bisect_right(self._starts.get(file, []), start) - 1
        for span in spans[max(first, 0) :]:
            if span.start >= end:
                return
            if span.end > start:
                yield span

    @torch.inference_mode()
    def _bytes(self, span: _Span, origin: _Origin, low: int, high: int) -> memoryview:
        """Bytes `low` to `high` of a tensor."""
        first, last = low // span.row_bytes, -(-high // span.row_bytes)
        # A stream of its own: the copy waits for no step, and no step for it.
        with torch.cuda.stream(self._stream):
            rows = _on_host(origin.rows(first, last), span.dtype)
        content: memoryview = rows.view(-1).view(torch.uint8).numpy().data
        shift = first * span.row_bytes
        return content[low - shift : high - shift]


def _on_host(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if rows.device.type == "cpu":
        return rows.to(dtype).contiguous()
    # As for KV: one pinned buffer of torch's cache is faster than a copy to pageable memory.
    pinned = torch.empty(rows.shape, dtype=dtype, pin_memory=True)
    return pinned.copy_(rows)


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch leaves it so


def _origins(weights: DecoderWeights, config: ModelConfig) -> Iterator[tuple[Part, _Origin]]:
    embedding, final_norm, head = outer_parts(config)
    yield embedding, _tensor(weights.embedding)
    yield final_norm, _tensor(weights.final_norm)
    if head is not embedding:
        yield from _stacked((head,), (), weights.head)
    for index, layer in enumerate(weights.layers):
        yield from _of_layer(config, index, layer)


def _of_layer(
    config: ModelConfig, index: int, layer: LayerWeights
) -> Iterator[tuple[Part, _Origin]]:
    plan = layer_plan(config, index)
    norms = (
        (plan.input_norm, layer.input_norm),
        (plan.query_norm, layer.query_norm),
        (plan.key_norm, layer.key_norm),
        (plan.post_attention_norm, layer.post_attention_norm),
    )
    for parts, tensor in norms:
        if parts and tensor is not None:
            yield parts[0], _tensor(tensor)
    yield from _stacked(plan.qkv, plan.qkv_bias, layer.qkv)
    yield from _stacked(plan.output, plan.output_bias, layer.output)
    yield from _stacked(plan.gate_up, plan.gate_up_bias, layer.gate_up)
    yield from _stacked(plan.down, plan.down_bias, layer.down)


def _tensor(tensor: torch.Tensor) -> _Origin:
    return _Origin(tensor.dtype, lambda first, end: tensor[first:end])


def _stacked(
    parts: tuple[Part, ...], biases: tuple[Part, ...], linear: LinearWeights
) -> Iterator[tuple[Part, _Origin]]:
    """The parts of one projection and of its bias."""
    begin = 0
    for part in parts:
        yield part, _Origin(linear.dtype, _shifted(linear.rows, begin))
        begin += part.shape[0]
    begin, bias = 0, linear.bias
    for part in biases if bias is not None else ():
        assert bias is not None  # noqa: S101 - in the line above
        yield part, _Origin(bias.dtype, _shifted(lambda a, b: bias[a:b], begin))
        begin += part.shape[0]


def _shifted(
    rows: Callable[[int, int], torch.Tensor], begin: int
) -> Callable[[int, int], torch.Tensor]:
    return lambda first, end: rows(begin + first, begin + end)
