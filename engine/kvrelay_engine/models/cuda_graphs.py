"""Decode steps captured as CUDA graphs: one launch instead of a few hundred.

A graph fixes shapes and addresses. One is captured for each of a few batch sizes, over the first rows
of the workspace; a step takes the smallest that holds it and fills the spare rows with copies of the
first. Their attention is empty (context 0), and the KV they write is that of the row they copy, to the
same slot.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kvrelay_engine.models.decoder import Decoder, KVWritten
from kvrelay_engine.models.workspace import Workspace
from kvrelay_kernels.layout import AttentionLayout

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    layout: AttentionLayout
    """What the captured kernels read; `fill` puts a step's sequences there."""
    rows: Workspace

    def fill(self, work: Workspace, layout: AttentionLayout) -> None:
        used, width = layout.block_tables.shape
        self.layout.block_tables[:used, :width].copy_(layout.block_tables)
        self.layout.context_lens[:used].copy_(layout.context_lens)
        spare = slice(used, self.rows.capacity)
        if spare.start == spare.stop:
            return
        self.layout.context_lens[spare].zero_()
        for own, step in (
            (self.rows.residual, work.residual),
            (self.rows.cos, work.cos),
            (self.rows.sin, work.sin),
            (self.rows.slots, work.slots),
        ):
            own[spare].copy_(step[:1].expand_as(own[spare]))


class CapturedDecode:
    """Graphs of one decoder over one workspace and one pool, which it keeps alive."""

    def __init__(
        self, decoder: Decoder, workspace: Workspace, kv: torch.Tensor, *, max_blocks: int
    ) -> None:
        """Capture all sizes. Runs garbage through block 0 of the pool: nobody may own it yet.

        Args:
            decoder: whose layers to capture.
            workspace: the activations of every step, before and after.
            kv: the pool.
            max_blocks: blocks of the longest sequence; a longer one runs without a graph.
        """
        self._decoder = decoder
        self._kv = kv
        self._max_blocks = max_blocks
        self._graphs: dict[int, _Graph] = {}
        pool: Any = None
        # The largest first: the smaller ones fit into the memory it has set aside.
        for size in sorted(BATCH_SIZES, reverse=True):
            if size <= workspace.capacity:
                captured = self._capture(workspace.first(size), size, pool)
                pool = captured.graph.pool()
                self._graphs[size] = captured

    def replay(
        self, work: Workspace, layout: AttentionLayout, kv_written: KVWritten | None
    ) -> bool:
        """Run the layers of a step, if there is a graph for it; returns whether there was."""
        rows, width = layout.block_tables.shape
        size = next((size for size in sorted(self._graphs) if size >= rows), None)
        decodes_only = layout.num_decodes == rows and kv_written is None
        if size is None or not decodes_only or width > self._max_blocks:
            return False
        captured = self._graphs[size]
        captured.fill(work, layout)
        captured.graph.replay()
        return True

    def _capture(self, rows: Workspace, size: int, pool: Any) -> _Graph:
        device = self._kv.device
        tables = torch.zeros((size, self._max_blocks), dtype=torch.int32, device=device)
        layout = _decode_layout(tables, size)
        # Compilation, autotuning and handle creation happen on a first run, outside the capture.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._decoder.layers(rows, layout, self._kv, lambda _: None)
        torch.cuda.current_stream(device).wait_stream(stream)
        # What the kernels derive of a layout must be made inside the capture, to be made again.
        layout = _decode_layout(tables, size)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._decoder.layers(rows, layout, self._kv, lambda _: None)
        return _Graph(graph, layout, rows)


def _decode_layout(tables: torch.Tensor, size: int) -> AttentionLayout:
    device = tables.device
    return AttentionLayout(
        block_tables=tables,
        query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
        context_lens=torch.ones(size, dtype=torch.int32, device=device),
        host_query_lens=(1,) * size,
        host_context_lens=(1,) * size,
        num_decodes=size,
    )
