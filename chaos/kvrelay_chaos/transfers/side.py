"""One side of many transfers: a real pool, allocator, staging buffers and transport, without a model.

`Side.receive` and `Side.send` do with one transfer what the workers do: blocks are taken before it,
`KvReceiver` or `KvSender` moves them, and they are given back once the task has ended, however it ended.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from xxhash import xxh3_128_hexdigest

from kvrelay_decode.receiver import KvReceiver, Received
from kvrelay_engine.cache.allocator import Allocation, BlockAllocator
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.models.config import parse_model_config
from kvrelay_engine.sequence import SequenceSpec
from kvrelay_prefill.sender import FirstOutput, KvSender
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_protocol.trace import TraceContext
from kvrelay_transfer.kit import TransferKit
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.lease import LeaseId, OpenLease
from kvrelay_transfer.staging import StagingBuffers, page_aligned
from kvrelay_transfer.ticket import new_ticket
from kvrelay_transfer.transport import Buffer, KVTransport

FIRST_TOKEN = 7
"""What every hand-over record says."""
_TRACE = TraceContext(b"\1" * 16, b"\1" * 8, 0)


@dataclass(frozen=True, slots=True)
class Shape:
    """How much KV a transfer moves, and in how many messages. Sizes in tokens, blocks and bytes."""

    num_layers: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    block_size: int = 16
    blocks: int = 48
    """Of one transfer."""
    num_blocks: int = 64
    """Of each pool."""
    staging_bytes: int = 1024 * 1024
    lease_s: float = 5.0
    deadline_s: float = 60.0

    @property
    def layout(self) -> KvLayout:
        return KvLayout(
            model_fingerprint="chaos",
            dtype="bfloat16",
            block_size=self.block_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )

    @property
    def transfer_bytes(self) -> int:
        """KV of one transfer, without headers and record."""
        return self.blocks * self.layout.block_bytes

    def pool(self) -> KVPool:
        """Zeroed blocks of this layout."""
        config = parse_model_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": self.head_dim * self.num_kv_heads,
                "intermediate_size": 64,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_kv_heads,
                "num_key_value_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "vocab_size": 64,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
            }
        )
        return KVPool(
            config,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
        )


@dataclass(slots=True)
class Side:
    """What one worker holds for its transfers."""

    shape: Shape
    kit: TransferKit
    pool: KVPool
    allocator: BlockAllocator
    epoch: int
    random: torch.Generator
    """Of what `refill` writes."""
    staging_memory: list[Buffer]
    """Of the staging buffers."""

    @classmethod
    async def start(
        cls, shape: Shape, transport: KVTransport, *, staging_count: int, seed: int = 0
    ) -> "Side":
        """Start `transport`; `seed` decides what `refill` writes."""
        await transport.start()
        memory: list[Buffer] = []

        def allocate(nbytes: int) -> Buffer:
            memory.append(page_aligned(nbytes))
            return memory[-1]

        staging = StagingBuffers(staging_count, shape.staging_bytes, allocate)
        return cls(
            shape,
            TransferKit(transport, staging, shape.layout),
            shape.pool(),
            BlockAllocator(shape.num_blocks, shape.block_size),
            secrets.randbits(64),
            torch.Generator().manual_seed(seed),
            memory,
        )

    def take(self, *, leased: bool) -> Allocation:
        """Blocks of one transfer.

        Raises:
            RuntimeError: some were not given back after an earlier one.
        """
        allocation = self.allocator.allocate(self.shape.blocks, leased=leased)
        if allocation is None:
            raise RuntimeError(f"{self.allocator.counts} have no {self.shape.blocks} blocks left")
        return allocation

    def refill(self, allocation: Allocation) -> None:
        """Let these blocks hold what none held before."""
        words = self.pool.tensor.view(torch.int16)
        shape = (*words.shape[:2], len(allocation.blocks), *words.shape[3:])
        words[:, :, list(allocation.blocks)] = torch.randint(
            -(2**15), 2**15 - 1, shape, generator=self.random, dtype=torch.int16
        )

    def receiver(
        self,
        allocation: Allocation,
        on_granted: Callable[[OpenLease], None],
        on_missing: Callable[[tuple[int, ...]], None],
    ) -> KvReceiver:
        """A receiver into leased blocks; `on_granted` gets the lease once a receive is posted."""
        identity = LeaseId(secrets.token_bytes(16), self.epoch, allocation.generation)
        tag = secrets.randbits(64)
        ticket, address = new_ticket(), self.kit.transport.address
        lease = OpenLease(
            identity, tag, address, 0, self.kit.staging.nbytes, self.kit.layout, ticket
        )
        return KvReceiver(
            identity,
            ticket=ticket,
            tag=tag,
            spec=self._spec,
            prompt_blocks=allocation.blocks,
            first_block=0,
            kit=self.kit,
            pool=self.pool,
            lease_s=self.shape.lease_s,
            deadline=time.monotonic() + self.shape.deadline_s,
            on_posted=lambda: on_granted(lease),
            on_missing=on_missing,
        )

    def sender(self, allocation: Allocation) -> KvSender:
        """A sender of blocks that are computed already."""
        sender = KvSender(
            self._spec, self.kit, self.pool, lease_s=self.shape.lease_s, on_sent=lambda _: None
        )
        sender.admitted(allocation.blocks, self.shape.blocks, _TRACE)
        sender.computed(FirstOutput(token=FIRST_TOKEN, cached_tokens=0))
        return sender

    @property
    def _spec(self) -> SequenceSpec:
        tokens = tuple(range(self.shape.blocks * self.shape.block_size))
        return SequenceSpec(
            1, "chaos", tokens, 0, 1, frozenset(), SamplingParams(), self.shape.deadline_s
        )

    def digest(self, allocation: Allocation) -> str:
        """Of the content of these blocks in all layers, in their order."""
        content = self.pool.tensor.index_select(2, torch.tensor(allocation.blocks))
        return str(xxh3_128_hexdigest(content.view(torch.int16).numpy().data))

    def leaks(self) -> list[str]:
        """What is still held although nothing is under way; empty when all is well."""
        found: list[str] = []
        counts = self.allocator.counts
        if counts.free + counts.cached != counts.total:
            found.append(f"blocks: {counts}")
        if self.kit.staging.held:
            found.append(f"{self.kit.staging.held} staging buffers")
        try:
            self.allocator.check_integrity()
            self.kit.staging.check_integrity()
        except AssertionError as error:
            found.append(str(error))
        return found


async def outcome_of(task: "asyncio.Task[Received] | asyncio.Task[None]") -> BaseException | None:
    """Wait for the end of a transfer; what it raised, its own cancel included."""
    await asyncio.wait({task})
    return asyncio.CancelledError() if task.cancelled() else task.exception()
