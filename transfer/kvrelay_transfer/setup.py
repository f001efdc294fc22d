"""A worker's KV plane, started from its settings."""

import dataclasses

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import LayoutMismatch
from kvrelay_transfer.frames import HEADER_SIZE
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.staging import Allocator, StagingBuffers, page_aligned
from kvrelay_transfer.transport import complete_uri, create_transport

_RECORD_BYTES = 2048
"""More than a hand-over record has: three times as much as its notes of 64 messages."""


async def make_kit(
    transport: str,
    layout: pb.KvLayout,
    *,
    staging_count: int,
    staging_bytes: int,
    allocate: Allocator = page_aligned,
) -> TransferKit:
    """Start the transport and allocate staging buffers.

    Args:
        transport: URI, or just its scheme.
        layout: of the blocks this worker holds.
        staging_count: transfers that can be under way at once.
        staging_bytes: payload of one buffer; raised to what one block of one layer needs.

    Raises:
        TransportMisconfigured: the environment leaves no usable transport.
    """
    ours = layout_from_message(layout)
    endpoint = create_transport(complete_uri(transport))
    await endpoint.start()
    # The header comes on top: blocks are powers of two, and one that just does not fit halves messages.
    nbytes = HEADER_SIZE + max(staging_bytes, ours.layer_block_bytes, _RECORD_BYTES)
    return TransferKit(endpoint, StagingBuffers(staging_count, nbytes, allocate), ours)


def layout_from_message(message: pb.KvLayout) -> KvLayout:
    """The layout manifest of a hello or a lease.

    Raises:
        LayoutMismatch: it is none that blocks can have.
    """
    try:
        return _layout(message)
    except ValueError as error:
        raise LayoutMismatch(f"kv_layout: {error}") from error


def _layout(message: pb.KvLayout) -> KvLayout:
    return KvLayout(
        model_fingerprint=message.model_fingerprint,
        dtype=message.dtype,
        block_size=message.block_size,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        protocol_version=message.protocol_version,
        tensor_parallel=max(1, message.tensor_parallel),
        tensor_rank=message.tensor_rank,
    )


def message_from_layout(layout: KvLayout) -> pb.KvLayout:
    """The inverse, for a lease."""
    return pb.KvLayout(**dataclasses.asdict(layout))
