"""One forward pass: the decoder's layers run op by op, or replayed from a recording of them."""

from collections.abc import Callable

import torch

from kvrelay_engine.models.decoder import Decoder, KVWritten, PackedTokens
from kvrelay_engine.models.workspace import Workspace
from kvrelay_kernels.layout import AttentionLayout


class ForwardPass:
    """Owns the workspace of a decoder and knows the fastest way through its layers."""

    def __init__(self, decoder: Decoder, kv: torch.Tensor, capacity: int) -> None:
        """`capacity` is the number of tokens of the largest step expected; a larger one allocates."""
        self.decoder = decoder
        self._kv = kv
        self._device = kv.device
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
        if tokens > self._workspace.capacity:
            self._grow(tokens)
        work = self._workspace.first(tokens)
        self.decoder.begin(packed, work)
        self._layers(work, packed.layout, kv_written)
        return self.decoder.logits(work, sampled_rows)

    def _grow(self, capacity: int) -> None:
        weights = self.decoder.weights
        self._workspace = Workspace.allocate(
            self.decoder.config, capacity, self._device, weights.activation_dtype
        )
        self._layers: _Layers = _OpByOp(self.decoder, self._kv).run


_Layers = Callable[[Workspace, AttentionLayout, KVWritten | None], None]


def _ignore(_layer: int) -> None:
    pass


class _OpByOp:
    """Each op called from here."""

    def __init__(self, decoder: Decoder, kv: torch.Tensor) -> None:
        self._decoder = decoder
        self._kv = kv

    def run(self, work: Workspace, layout: AttentionLayout, kv_written: KVWritten | None) -> None:
        self._decoder.layers(work, layout, self._kv, kv_written or _ignore)
