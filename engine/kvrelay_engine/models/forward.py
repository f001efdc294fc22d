"""One forward pass: the decoder's layers op by op, or replayed from a recording of them.

```
                        ┌─ op by op          any device, any model
begin ─ layers ─ logits ┤
                        ├─ a tape            CPU with compiled kernels: one call a step
                        └─ a CUDA graph      decode steps on a GPU: one launch a step
```
"""

import contextlib
from collections.abc import Callable

import torch

from kvrelay_engine.models.cuda_graphs import CapturedDecode
from kvrelay_engine.models.decoder import Decoder, KVWritten, PackedTokens
from kvrelay_engine.models.workspace import Workspace
from kvrelay_kernels.cpu.library import CpuLibrary, NotNative
from kvrelay_kernels.cpu.paged_attention import layout_args
from kvrelay_kernels.cpu.tape import Tape
from kvrelay_kernels.layout import AttentionLayout, attention_layout

Layers = Callable[[Workspace, AttentionLayout, KVWritten | None], None]
"""Computes all layers of a step: its rows of the workspace, its sequences, who is told of written KV."""


class ForwardPass:
    """Owns the workspace of a decoder and knows the fastest way through its layers."""

    def __init__(self, decoder: Decoder, kv: torch.Tensor, capacity: int) -> None:
        """`capacity` is the number of tokens of the largest step expected; a larger one allocates.

        On a GPU, steps are captured now: no block of the pool may be in use.
        """
        self.decoder = decoder
        self._kv = kv
        self._grow(capacity)

    def run(
        self, packed: PackedTokens, sampled_rows: torch.Tensor, kv_written: KVWritten | None
    ) -> torch.Tensor:
        """Write the KV of all tokens and return the logits of some.

        Args:
            packed: the step's inputs.
            sampled_rows: `[sampled]` int64.
            kv_written: told about each layer once its KV is written, before its attention runs; None
                if nobody needs to know.

        Returns:
            `[sampled, vocabulary]` in the dtype of the activations; valid until the next step.
        """
        tokens = packed.ids.shape[0]
        layers = self._layers
        if tokens <= self._workspace.capacity:
            work = self._workspace.first(tokens)
        elif self._kv.device.type == "cpu":
            self._grow(tokens)
            work, layers = self._workspace, self._layers
        else:
            # Graphs belong to their workspace, and capturing new ones would write to blocks in use.
            work = self._allocate(tokens)
            layers = _OpByOp(self.decoder, self._kv)
        self.decoder.begin(packed, work)
        layers(work, packed.layout, kv_written)
        return self.decoder.logits(work, sampled_rows)

    @property
    def is_recorded(self) -> bool:
        """Whether a step is replayed in one call."""
        return not isinstance(self._layers, _OpByOp)

    def _allocate(self, capacity: int) -> Workspace:
        dtype = self.decoder.weights.activation_dtype
        return Workspace.allocate(self.decoder.config, capacity, self._kv.device, dtype)

    def _grow(self, capacity: int) -> None:
        self._workspace = self._allocate(capacity)
        self._layers: Layers = self._fastest()

    def _fastest(self) -> Layers:
        if self._kv.device.type == "cuda":
            return _Captured(self.decoder, self._workspace, self._kv)
        library = self.decoder.weights.head.library
        if library is not None:
            # A head of an odd size, say, is torch's to compute, and torch is not on the tape.
            with contextlib.suppress(NotNative):
                return _Recorded(library, self.decoder, self._workspace, self._kv)
        return _OpByOp(self.decoder, self._kv)


def _ignore(_layer: int) -> None:
    pass


class _OpByOp:
    """Each op called from here."""

    def __init__(self, decoder: Decoder, kv: torch.Tensor) -> None:
        self._decoder = decoder
        self._kv = kv

    def __call__(
        self, work: Workspace, layout: AttentionLayout, kv_written: KVWritten | None
    ) -> None:
        self._decoder.layers(work, layout, self._kv, kv_written or _ignore)


class _Captured:
    """Decode steps from graphs, the others op by op."""

    def __init__(self, decoder: Decoder, workspace: Workspace, kv: torch.Tensor) -> None:
        num_blocks, block_size = kv.shape[2], kv.shape[3]
        longest = -(-decoder.config.max_position_embeddings // block_size)
        self._op_by_op = _OpByOp(decoder, kv)
        self._decode = CapturedDecode(decoder, workspace, kv, max_blocks=min(longest, num_blocks))

    def __call__(
        self, work: Workspace, layout: AttentionLayout, kv_written: KVWritten | None
    ) -> None:
        if not self._decode.replay(work, layout, kv_written):
            self._op_by_op(work, layout, kv_written)


class _Recorded:
    """A tape of the layers over one workspace and one pool, which it keeps alive."""

    def __init__(
        self, library: CpuLibrary, decoder: Decoder, workspace: Workspace, kv: torch.Tensor
    ) -> None:
        """Record a step that fills the workspace.

        Raises:
            NotNative: an op has no compiled kernel for this model.
        """
        self._keep = workspace, kv
        self._tape = Tape(library)
        self._written: list[int] = []
        """For each layer, the ops that are done when its KV is written."""
        layout = attention_layout(
            torch.zeros((1, 1), dtype=torch.int32), [workspace.capacity], [workspace.capacity]
        )
        self._layout_args = layout_args(layout)
        with self._tape.recording():
            decoder.layers(workspace, layout, kv, lambda _: self._written.append(len(self._tape)))

    def __call__(
        self, work: Workspace, layout: AttentionLayout, kv_written: KVWritten | None
    ) -> None:
        rows = work.residual.shape[0]
        self._layout_args.point_at(layout)
        begin = 0
        if kv_written is not None:
            for layer, end in enumerate(self._written):
                self._tape.replay(rows, begin, end)
                kv_written(layer)
                begin = end
        self._tape.replay(rows, begin, len(self._tape))
