"""One step of the engine: a scheduler's batch in, sampled tokens out.

```
Batch --prepare--> PreparedBatch --forward--> hidden --logits of sampling rows--> StepResult
                                     `-- layers_done(first, end) as groups of layers are written
```
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvrelay_engine.batch import Batch, LayersDone, SequenceSlice, StepResult
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.models.config import ModelConfig
from kvrelay_engine.models.decoder import Decoder, PackedTokens
from kvrelay_engine.sampler.sampler import PreparedSampling, prepare_sampling, sample_tokens
from kvrelay_kernels.paged_attention import attention_layout

Indices = NDArray[np.int64]


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
        self,
        config: ModelConfig,
        decoder: Decoder,
        pool: KVPool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.decoder = decoder
        self.pool = pool
        self.device = device
        self.dtype = dtype

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
        """
        prepared = self.prepare(batch)
        groups = _LayerGroups(layers_done, group_layers, self.config.num_layers)
        hidden = self.decoder.forward(prepared.packed, self.pool.tensor, groups.kv_written)
        if not prepared.sampled_ids:
            return StepResult(tokens={})
        logits = self.decoder.logits(hidden.index_select(0, prepared.sampled_rows))
        tokens = sample_tokens(logits, prepared.sampling).tolist()
        return StepResult(tokens=dict(zip(prepared.sampled_ids, tokens, strict=True)))

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Check a batch and build its tensors."""
        if not batch.slices:
            raise ValueError("the batch is empty")
        # Single tokens lead, so that attention takes them in one padded call.
        ordered = sorted(batch.slices, key=lambda part: len(part.tokens) != 1)
        lengths = [len(part.tokens) for part in ordered]
        contexts = [part.start + len(part.tokens) for part in ordered]
        tables = [np.array(part.block_table, dtype=np.int64) for part in ordered]
        for part, table in zip(ordered, tables, strict=True):
            self._check(part, table)
        tokens = np.concatenate([np.array(part.tokens, dtype=np.int64) for part in ordered])
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self.config.vocab_size}")
        positions = [
            np.arange(part.start, context) for part, context in zip(ordered, contexts, strict=True)
        ]
        slots = np.concatenate(
            [self._slots(table, at) for table, at in zip(tables, positions, strict=True)]
        )
        last_rows = np.cumsum(lengths) - 1
        sampled = [index for index, part in enumerate(ordered) if part.sampling is not None]
        return PreparedBatch(
            packed=PackedTokens(
                ids=self._to_device(tokens),
                positions=self._to_device(np.concatenate(positions)),
                slots=self._to_device(slots),
                layout=attention_layout(self._padded_tables(tables, contexts), lengths, contexts),
            ),
            sampled_ids=tuple(ordered[index].sequence_id for index in sampled),
            sampled_rows=self._to_device(last_rows[sampled]),
            sampling=prepare_sampling(
                [part.sampling for part in ordered if part.sampling is not None],
                [contexts[index] for index in sampled],
                self.device,
            ),
        )

    def _check(self, part: SequenceSlice, table: Indices) -> None:
        """An index out of range would read or write another sequence's KV."""
        if not part.tokens or part.start < 0:
            raise ValueError(f"sequence {part.sequence_id}: no tokens or a negative start")
        if len(table) * self.pool.block_size < part.start + len(part.tokens):
            raise ValueError(f"sequence {part.sequence_id}: the block table is too short")
        if table.min() < 0 or table.max() >= self.pool.num_blocks:
            raise ValueError(f"sequence {part.sequence_id}: a block is outside the pool")

    def _slots(
        self,
        table: Indices,
        positions: Indices,
    ) -> Indices:
        size = self.pool.block_size
        return table[positions // size] * size + positions % size

    def _padded_tables(
        self,
        tables: Sequence[Indices],
        contexts: Sequence[int],
    ) -> torch.Tensor:
        needed = [-(-context // self.pool.block_size) for context in contexts]
        padded = np.zeros((len(tables), max(needed)), dtype=np.int32)
        for row, table, blocks in zip(padded, tables, needed, strict=True):
            row[:blocks] = table[:blocks]
        return self._to_device(padded)

    def _to_device(self, array: NDArray[np.int64 | np.int32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


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
