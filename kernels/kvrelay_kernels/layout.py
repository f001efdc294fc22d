"""Where the queries of a step and their KV lie, for every kernel that attends."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvrelay_kernels.checks import check_shape


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Where the queries of a step and their KV lie; built once a step, shared by every layer.

    ```
    packed query rows  | d0 | d1 | d2 | s3 s3 s3 s3 | s4 s4 |
                       `- num_decodes -'
                         one row each   `- any length each -'
    ```

    The lengths exist twice: tensors for kernels on the device, tuples for choices made on the host
    without waiting for it.
    """

    block_tables: torch.Tensor
    """`[sequences, max_blocks]` int32 on the device; rows are padded with any valid block."""
    query_starts: torch.Tensor
    """`[sequences + 1]` int32 on the device: first packed row of each sequence, and their total."""
    context_lens: torch.Tensor
    """`[sequences]` int32 on the device: tokens in the pool, the new ones included."""
    host_query_lens: tuple[int, ...]
    host_context_lens: tuple[int, ...]
    num_decodes: int
    """How many leading sequences have exactly one query."""
    derived: dict[object, object] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What kernels made of this layout in the step's first layer and use again in the others. A
    captured pass needs a layout of its own (`replace(layout)`): what an earlier one made would not
    be made again when the graph is replayed."""

    def __post_init__(self) -> None:
        sequences = len(self.host_query_lens)
        check_shape("block_tables", self.block_tables, (sequences, None))
        check_shape("query_starts", self.query_starts, (sequences + 1,))
        check_shape("context_lens", self.context_lens, (sequences,))
        if any(length != 1 for length in self.host_query_lens[: self.num_decodes]):
            raise ValueError("a leading decode sequence has more than one query")


def attention_layout(
    block_tables: torch.Tensor, query_lens: Sequence[int], context_lens: Sequence[int]
) -> AttentionLayout:
    """Build a layout from host lengths; leading sequences with one query become the decode part."""
    device = block_tables.device
    starts = [0]
    for length in query_lens:
        starts.append(starts[-1] + length)
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
    return AttentionLayout(
        block_tables=block_tables,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        host_query_lens=tuple(query_lens),
        host_context_lens=tuple(context_lens),
        num_decodes=num_decodes,
    )
