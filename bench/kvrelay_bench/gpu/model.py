"""Whole decode steps of a random-weight model: this engine, then transformers on the same device."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kvrelay_bench.gpu.timing import Stopwatch, synchronize
from kvrelay_bench.gpu.work import Ceilings, DecodePoint, Job, ModelShape, Plan, Row

_BLOCK = 64
_WARM_STEPS = 4
_ENGINE, _PEER = "this engine, whole step", "transformers generate"


class _Loaded:
    """A model that is built when the first of its jobs runs, and freed with the last."""

    def __init__(self, build: Callable[[], Any], uses: int, device: torch.device) -> None:
        self._build = build
        self._model: Any = None
        self._uses = uses
        self._device = device

    @contextmanager
    def use(self) -> Iterator[Any]:
        try:
            if self._model is None:
                self._model = self._build()
            yield self._model
        finally:
            self._uses -= 1
            if not self._uses:
                self._model = None
            _free(self._device)


def model_jobs(watch: Stopwatch, plan: Plan, ceilings: Ceilings) -> Iterator[Job]:
    """Tokens per second of greedy decoding at fixed batch sizes, everything of a step included."""
    largest = max(plan.points, key=lambda point: point.batch)
    build = partial(_build_engine, plan.model, largest, watch.device)
    loaded = _Loaded(build, len(plan.points), watch.device)
    for point in plan.points:
        run = partial(_run_engine, loaded, plan.model, point, ceilings)
        yield Job("model", _ENGINE, _shape(plan.model, point), run)


def peer_jobs(watch: Stopwatch, plan: Plan, ceilings: Ceilings) -> Iterator[Job]:
    """The same steps through `generate` of transformers."""
    build = partial(_build_transformers, plan.model, watch.device)
    loaded = _Loaded(build, len(plan.points), watch.device)
    for point in plan.points:
        run = partial(_run_peer, loaded, plan.model, point, ceilings, watch.device)
        yield Job("peers", _PEER, _shape(plan.model, point), run)


def _run_engine(loaded: _Loaded, model: ModelShape, point: DecodePoint, ceilings: Ceilings) -> Row:
    with loaded.use() as runner:
        seconds, finite = _time_steps(runner, model, point)
    row = _row("model", _ENGINE, model, point, seconds=seconds, ceilings=ceilings)
    # Random weights have no right answer; tests compare answers. This finds NaN.
    return replace(row, error=0.0 if finite else 1.0, tolerance=0.0)


def _run_peer(
    loaded: _Loaded,
    model: ModelShape,
    point: DecodePoint,
    ceilings: Ceilings,
    device: torch.device,
) -> Row:
    with loaded.use() as peer:
        seconds = _time_generate(peer, model, point, device)
    return _row("peers", _PEER, model, point, seconds=seconds, ceilings=ceilings)


def _shape(model: ModelShape, point: DecodePoint) -> str:
    return f"{model.name}, batch {point.batch}, context {point.context}"


def _row(
    part: str,
    name: str,
    model: ModelShape,
    point: DecodePoint,
    *,
    seconds: float,
    ceilings: Ceilings,
) -> Row:
    context = point.context + _WARM_STEPS + point.steps // 2
    return Row(
        part,
        name,
        _shape(model, point),
        nbytes=model.step_bytes(point.batch, context),
        flops=model.step_flops(point.batch, context),
        seconds=seconds,
        floor_seconds=model.step_floor_s(ceilings, point.batch, context),
        units_per_s=point.batch / seconds,
    )


def _build_engine(model: ModelShape, largest: DecodePoint, device: torch.device) -> Any:
    from kvrelay_engine.cache.pool import KVPool
    from kvrelay_engine.models.config import parse_model_config
    from kvrelay_engine.models.decoder import Decoder, DecoderWeights, LayerWeights
    from kvrelay_engine.runner import ModelRunner
    from kvrelay_kernels.linear import activation_dtype, pack_linear

    config = parse_model_config(model.hugging_face_config())
    stored = torch.bfloat16
    active = activation_dtype(device, stored)

    def linear_weights(outputs: int, width: int) -> Any:
        part = torch.empty(outputs, width, dtype=stored, device=device).normal_(std=0.02)
        return pack_linear([part], device=device, dtype=stored)

    def norm() -> torch.Tensor:
        return torch.ones(model.hidden, dtype=active, device=device)

    def layer() -> LayerWeights:
        qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
        return LayerWeights(
            input_norm=norm(),
            qkv=linear_weights(qkv, model.hidden),
            query_norm=None,
            key_norm=None,
            output=linear_weights(model.hidden, model.heads * model.head_dim),
            post_attention_norm=norm(),
            gate_up=linear_weights(2 * model.intermediate, model.hidden),
            down=linear_weights(model.hidden, model.intermediate),
        )

    weights = DecoderWeights(
        embedding=torch.empty(model.vocabulary, model.hidden, dtype=stored, device=device).normal_(
            std=0.02
        ),
        layers=tuple(layer() for _ in range(model.layers)),
        final_norm=norm(),
        head=linear_weights(model.vocabulary, model.hidden),
    )
    blocks = largest.batch * _blocks_of(largest)
    pool = KVPool(config, num_blocks=blocks, block_size=_BLOCK, device=device, dtype=stored)
    for layer_kv in pool.tensor:
        layer_kv.normal_(std=0.5)
    return ModelRunner(config, Decoder(config, weights), pool, max_step_tokens=largest.batch)


def _blocks_of(point: DecodePoint) -> int:
    return -(-(point.context + _WARM_STEPS + point.steps + 1) // _BLOCK)


def _time_steps(runner: Any, model: ModelShape, point: DecodePoint) -> tuple[float, bool]:
    """Median wall time of a step, and whether every step gave every sequence a token."""
    from kvrelay_engine.batch import Batch, SequenceSlice
    from kvrelay_protocol.sampling import SamplingParams

    params = SamplingParams(temperature=0.0)
    width = _blocks_of(point)
    tables = [tuple(range(i * width, (i + 1) * width)) for i in range(point.batch)]
    tokens = [(7 * i + 1) % model.vocabulary for i in range(point.batch)]
    samples, finite = [], True
    for step in range(_WARM_STEPS + point.steps):
        batch = Batch(
            tuple(
                SequenceSlice(i, (tokens[i],), point.context + step, tables[i], params)
                for i in range(point.batch)
            )
        )
        begun = time.perf_counter()
        result = runner.step(batch)
        samples.append(time.perf_counter() - begun)
        finite = finite and not result.errors
        tokens = [result.tokens.get(i, 0) for i in range(point.batch)]
    return statistics.median(samples[_WARM_STEPS:]), finite


def _build_transformers(model: ModelShape, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    given = model.hugging_face_config()
    skipped = {"architectures", "model_type", "torch_dtype"}
    config = LlamaConfig(**{key: value for key, value in given.items() if key not in skipped})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _time_generate(
    model: Any, shape: ModelShape, point: DecodePoint, device: torch.device
) -> float:
    """Seconds of one decode step: two calls that differ in their number of steps."""
    prompt = torch.randint(0, shape.vocabulary, (point.batch, point.context), device=device)
    mask = torch.ones_like(prompt)

    def call(new: int) -> float:
        synchronize(device)
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=mask, do_sample=False, pad_token_id=0, eos_token_id=None,
                min_new_tokens=new, max_new_tokens=new,
            )  # fmt: skip
        synchronize(device)
        return time.perf_counter() - begun

    call(2)
    short, long = call(1), call(1 + point.steps)
    return max(long - short, 1e-9) / point.steps


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
