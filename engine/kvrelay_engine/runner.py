"""One step of the engine: a scheduler's batch in, sampled tokens out.

```
Batch --prepare--> PreparedBatch --forward--> hidden --logits of sampling rows--> StepResult
                                     `-- layers_done(first, end) as groups of layers are written
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from kvrelay_engine.batch import Batch, LayersDone, SequenceSlice, StepResult
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.models.config import ModelConfig
from kvrelay_engine.models.decoder import Decoder, PackedTokens
from kvrelay_engine.models.forward import ForwardPass
from kvrelay_engine.models.placement import copied_weights, pinned
from kvrelay_engine.sampler.sampler import (
    PreparedSampling,
    prepare_sampling,
    sample_tokens,
    sampled_logprobs,
)
from kvrelay_engine.upload import upload
from kvrelay_kernels.layout import AttentionLayout
from kvrelay_protocol.errors import InternalError, KvrelayError


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """The tensors of one step, all on the device before its forward pass starts."""

    packed: PackedTokens
    sampled_ids: tuple[int, ...]
    """Sequence id of each sampled row."""
    sampled_rows: torch.Tensor
    """`[sampled]` int64: packed row of the last token of each of these sequences."""
    sampling: PreparedSampling


class ModelRunner:
    """Runs steps of one model over one pool. Not for use from several threads at once."""

    def __init__(
        self, config: ModelConfig, decoder: Decoder, pool: KVPool, *, max_step_tokens: int = 0
    ) -> None:
        """`max_step_tokens` sizes the activations; a larger step makes them grow."""
        self.config = config
        self.decoder = decoder
        self.pool = pool
        self.device = pool.device
        self.asleep = False
        self._weights_move = pool.device.type != "cpu"
        """When it sleeps: off the device."""
        self._capacity = max(max_step_tokens, pool.block_size)
        self._forward: ForwardPass | None = self._record()

    def _record(self) -> ForwardPass:
        return ForwardPass(self.decoder, self.pool.tensor, self._capacity)

    def sleep(self) -> None:
        """Give back the device's memory and the pool's. No block may be owned; what they held is lost.

        On a device the weights move to page-locked host memory (torch rounds each tensor up to a power of two
        there), and recorded steps and activations go. On a CPU the weights stay, and with them the
        recording, since the pool keeps its address. Idempotent.

        Raises:
            RuntimeError: the host has no memory for the weights; the model is as it was.
        """
        if self.asleep:
            return
        if self._weights_move:
            host = copied_weights(self.decoder.weights, pinned)
            self.decoder = Decoder(self.config, host)
            self._forward = None  # graphs and activations
        self.pool.release()
        self.asleep = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """The inverse of `sleep`, with an empty pool; steps are as before, bit by bit. Idempotent.

        Raises:
            torch.OutOfMemoryError: somebody else has the device's memory by now.
        """
        if not self.asleep:
            return
        self.pool.restore()
        if self._weights_move:
            self.decoder = Decoder(
                self.config,
                copied_weights(
                    self.decoder.weights, lambda held: held.to(self.device, non_blocking=True)
                ),
            )
            self._forward = self._record()
        self.asleep = False

    @torch.inference_mode()
    def step(
        self,
        batch: Batch,
        layers_done: LayersDone | None = None,
        group_layers: int | None = None,
    ) -> StepResult:
        """Compute one batch: write the KV of all its tokens, sample where a slice asks for it.

        Args:
            batch: slices of distinct sequences; at least one.
            layers_done: called in order, each layer in exactly one call, while later ones are still
                to be computed. It runs on the thread and stream of the step and may read the pool.
            group_layers: layers a call; None for one call with all.

        Raises:
            ValueError: a slice is empty, or a token, position or block is out of range.
            RuntimeError: the model sleeps.
        """
        if self.asleep or self._forward is None:
            raise RuntimeError("a model that sleeps computes nothing: wake it first")
        prepared = self.prepare(batch)
        groups = _LayerGroups(layers_done, group_layers, self.config.num_layers)
        kv_written = None if layers_done is None else groups.kv_written
        logits = self._forward.run(prepared.packed, prepared.sampled_rows, kv_written)
        if not prepared.sampled_ids:
            return StepResult(tokens={})
        finite = _finite_rows(logits)
        tokens = sample_tokens(logits, prepared.sampling)
        logprobs = sampled_logprobs(logits, tokens, prepared.sampling, prepared.sampled_ids)
        # The only wait for the device in a step without logprobs.
        drawn, good = torch.stack((tokens, finite.long())).tolist()
        rows = list(zip(prepared.sampled_ids, drawn, good, strict=True))
        return StepResult(
            {i: token for i, token, is_good in rows if is_good},
            {i: _not_finite(i) for i, _, is_good in rows if not is_good},
            logprobs,
        )

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Check a batch and build its tensors."""
        if not batch.slices:
            raise ValueError("the batch is empty")
        # Single tokens lead, so that attention takes them in one padded call.
        ordered = sorted(batch.slices, key=lambda part: len(part.tokens) != 1)
        lengths = [len(part.tokens) for part in ordered]
        contexts = [part.start + len(part.tokens) for part in ordered]
        tables = self._tables(ordered, contexts)
        tokens = np.fromiter(
            chain.from_iterable(part.tokens for part in ordered), np.int64, sum(lengths)
        )
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self.config.vocab_size}")
        # Packed row r of sequence s holds position `contexts[s] - ends[s] + r`.
        ends = np.cumsum(lengths)
        positions = np.arange(len(tokens)) + np.repeat(contexts - ends, lengths)
        size = self.pool.block_size
        blocks = tables[np.repeat(np.arange(len(ordered)), lengths), positions // size]
        sampled = [index for index, part in enumerate(ordered) if part.sampling is not None]
        ids, where, slots, block_tables, starts, context_lens, rows = upload(
            [
                tokens,
                positions,
                blocks.astype(np.int64) * size + positions % size,
                tables,
                np.concatenate(([0], ends)).astype(np.int32),
                np.array(contexts, dtype=np.int32),
                ends[sampled] - 1,
            ],
            self.device,
        )
        return PreparedBatch(
            packed=PackedTokens(
                ids=ids,
                positions=where,
                slots=slots,
                layout=AttentionLayout(
                    block_tables=block_tables,
                    query_starts=starts,
                    context_lens=context_lens,
                    host_query_lens=tuple(lengths),
                    host_context_lens=tuple(contexts),
                    num_decodes=sum(length == 1 for length in lengths),
                ),
            ),
            sampled_ids=tuple(ordered[index].sequence_id for index in sampled),
            sampled_rows=rows,
            sampling=prepare_sampling(
                [part.sampling for part in ordered if part.sampling is not None],
                [contexts[index] for index in sampled],
                self.device,
                [ordered[index].history for index in sampled],
            ),
        )

    def _tables(
        self, slices: Sequence[SequenceSlice], contexts: Sequence[int]
    ) -> NDArray[np.int32]:
        """The blocks that the step touches, `[slices, most]`, padded with block 0.

        Everything is checked here: an index out of range would read or write another sequence's KV.
        """
        needed = [-(-context // self.pool.block_size) for context in contexts]
        tables = np.zeros((len(slices), max(needed)), dtype=np.int32)
        for part, row, blocks in zip(slices, tables, needed, strict=True):
            if not part.tokens or part.start < 0:
                raise ValueError(f"sequence {part.sequence_id}: no tokens or a negative start")
            if len(part.block_table) < blocks:
                raise ValueError(f"sequence {part.sequence_id}: the block table is too short")
            row[:blocks] = part.block_table[:blocks]
        outside = ((tables < 0) | (tables >= self.pool.num_blocks)).any(axis=1)
        if outside.any():
            wrong = slices[int(outside.argmax())].sequence_id
            raise ValueError(f"sequence {wrong}: a block is outside the pool")
        return tables


def _finite_rows(logits: torch.Tensor) -> torch.Tensor:
    """Which rows have a token to draw, `[rows]` bool: one drawn from NaN would look like any other.

    The others become zeros, so that the draw of the batch goes on as ever.
    """
    finite = logits.amax(-1).isfinite()
    # A device would have to be waited for to learn that there is nothing to do.
    if logits.device.type != "cpu" or not finite.all():
        logits.masked_fill_(~finite.unsqueeze(-1), 0.0)
    return finite


def _not_finite(sequence_id: int) -> KvrelayError:
    return InternalError(
        f"sequence {sequence_id}: the model's logits are not finite; where float16 overflows, "
        "bfloat16 or float32 does not"
    )


class _LayerGroups:
    """Joins single layers into the groups that `layers_done` is told about."""

    def __init__(
        self, layers_done: LayersDone | None, group_layers: int | None, num_layers: int
    ) -> None:
        if group_layers is not None and group_layers < 1:
            raise ValueError(f"group_layers is {group_layers}, expected at least 1")
        self._layers_done = layers_done
        self._size = group_layers or num_layers
        self._num_layers = num_layers
        self._first = 0

    def kv_written(self, layer: int) -> None:
        end = layer + 1
        if end - self._first < self._size and end < self._num_layers:
            return
        if self._layers_done is not None:
            self._layers_done(self._first, end)
        self._first = end
