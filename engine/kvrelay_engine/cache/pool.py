"""The tensors of the paged KV cache, and their wire layout. Indices belong to the allocator."""

import math
from collections.abc import Sequence

import torch

from kvrelay_engine.cache.memory import HostMemory
from kvrelay_engine.cache.sizing import kv_bytes_per_block
from kvrelay_engine.models.config import ModelConfig
from kvrelay_kernels.kv_gather import (
    digests_while_copying,
    kv_gather,
    kv_gather_digest,
    kv_scatter,
    kv_scatter_digest,
)


class KVPool:
    """One tensor for all layers; owns the memory for as long as it lives.

    On the wire a group of layers is one contiguous buffer, row-major and little-endian, in one of two
    layouts. `gather` and `scatter` move whole blocks, `[layers, 2, blocks, block_size, kv_heads, head_dim]`
    in the dtype of the pool: the pool's own order, restricted to the blocks. `gather_tokens` and
    `scatter_tokens` move positions of a sequence for pools that are cut otherwise,
    `[layers, 2, tokens, kv_heads, head_dim]`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        heads: range | None = None,
    ) -> None:
        """Args: `heads` are those of the model's KV heads that this pool holds; None: all."""
        self.num_layers = config.num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self.heads = range(config.num_kv_heads) if heads is None else heads
        whole = kv_bytes_per_block(config, block_size, dtype.itemsize)
        self.bytes_per_block = whole // config.num_kv_heads * len(self.heads)
        self._shape = (
            config.num_layers,
            2,
            num_blocks,
            block_size,
            len(self.heads),
            config.head_dim,
        )
        on_host = device.type == "cpu"
        self._memory = HostMemory(math.prod(self._shape) * dtype.itemsize) if on_host else None
        # Zeros, so that whole blocks put on the wire never carry what the memory held before.
        self.tensor = self._zeros()
        """`[num_layers, 2, num_blocks, block_size, heads, head_dim]`; keys first."""

    @property
    def nbytes(self) -> int:
        """What the pool takes when all of it has been used."""
        return self.bytes_per_block * self.num_blocks

    def release(self) -> None:
        """Give the memory back to the system or to the device; what blocks held is lost. Nobody may own one.

        On a CPU the tensor stays where it is and reads as zeros: recorded steps point there. On a device
        there is none until `restore`.
        """
        if self._memory is not None:
            self._memory.release()
        else:
            self.tensor = self.tensor.new_empty(0)

    def restore(self) -> None:
        """After `release`: a pool of zeros again.

        Raises:
            torch.OutOfMemoryError: somebody else has the device's memory by now.
        """
        if self._memory is None:
            self.tensor = self._zeros()

    def _zeros(self) -> torch.Tensor:
        if self._memory is None:
            return torch.zeros(self._shape, dtype=self.dtype, device=self.device)
        return self._memory.tensor.view(self.dtype).view(self._shape)

    def wire_bytes(self, first_layer: int, end_layer: int, num_blocks: int) -> int:
        """Size of the wire layout of `num_blocks` blocks of the layers `[first_layer, end_layer)`."""
        return self.bytes_per_block // self.num_layers * (end_layer - first_layer) * num_blocks

    def gather(
        self,
        first_layer: int,
        end_layer: int,
        blocks: Sequence[int],
        out: memoryview | torch.Tensor,
        valid_tokens_in_last_block: int,
    ) -> bytes | None:
        """Write blocks of the layers `[first_layer, end_layer)` into `out` in the wire layout.

        The rows of the last block past `valid_tokens_in_last_block` are written as zeros, so equal
        tokens give equal bytes whatever the block held before. Returns when `out` is complete.

        Args:
            first_layer: first layer of the group.
            end_layer: one past its last layer.
            blocks: physical blocks, in the order of the sequence.
            out: writable host buffer of `wire_bytes(...)` bytes; a uint8 tensor or a memoryview.
                Pinned memory saves a copy on CUDA.
            valid_tokens_in_last_block: 1 to `block_size`.

        Returns:
            The digest of `out`, of `kvrelay_kernels.kv_gather`; None where it would take a second pass.

        Raises:
            ValueError: an index, a size or the buffer does not fit.
        """
        if not 1 <= valid_tokens_in_last_block <= self.block_size:
            raise ValueError(
                f"{valid_tokens_in_last_block} valid tokens in a block of {self.block_size}"
            )
        layers = self._layers(first_layer, end_layer)
        indices = self._indices(blocks)
        return self._gather(layers, indices, out, valid_tokens_in_last_block, digest=True)

    def gather_tokens(
        self,
        first_layer: int,
        end_layer: int,
        blocks: Sequence[int],
        tokens: range,
        out: memoryview | torch.Tensor,
        *,
        heads: range,
        dtype: torch.dtype,
        digest: bool = False,
    ) -> bytes | None:
        """Write positions of a sequence into `out`, `[layers, 2, tokens, heads, head_dim]`.

        Args:
            first_layer: first layer of the group.
            end_layer: one past its last layer.
            blocks: all physical blocks of the sequence, in its order.
            tokens: positions, inside of the blocks.
            out: writable host buffer of just this size; a uint8 tensor or a memoryview.
            heads: of the model, all of them in this pool.
            dtype: what is written; a conversion rounds to nearest.
            digest: whether it is wanted: whoever has only some of these heads can't take it again.

        Returns:
            The digest of `out`, as of `gather`; None where it is not wanted or would take a second pass.

        Raises:
            ValueError: an index, a size or the buffer does not fit.
        """
        rows = self._rows(first_layer, end_layer)
        slots = self._slots(blocks, tokens)
        if heads == self.heads and dtype == self.dtype:
            return self._gather(rows, slots, out, 1, digest=digest)
        part = rows[..., self._columns(heads), :].index_select(2, slots).to(dtype)
        _view(out, part.shape, dtype).copy_(part)
        return None

    def scatter(
        self,
        first_layer: int,
        end_layer: int,
        blocks: Sequence[int],
        payload: memoryview | torch.Tensor,
        *,
        digest: bool = False,
    ) -> bytes | None:
        """Write a payload in the wire layout into distinct blocks; the inverse of `gather`.

        Returns when `payload` may be reused: the digest of what was written, or None without `digest`.
        The blocks are written before it is known: nobody may read them until it is compared.

        Raises:
            ValueError: an index, a size or the payload does not fit, or a block is named twice.
        """
        _check_distinct(blocks)
        layers = self._layers(first_layer, end_layer)
        return self._scatter(layers, self._indices(blocks), payload, digest=digest)

    def scatter_tokens(
        self,
        first_layer: int,
        end_layer: int,
        blocks: Sequence[int],
        tokens: range,
        payload: memoryview | torch.Tensor,
        *,
        heads: range,
        digest: bool = False,
        clear_behind: bool = False,
    ) -> bytes | None:
        """Write a payload of `gather_tokens`, in the dtype of this pool; the inverse of it.

        Args:
            first_layer: first layer of the group.
            end_layer: one past its last layer.
            blocks: all physical blocks of the sequence, distinct, in its order.
            tokens: the positions in the payload.
            payload: `[layers, 2, tokens, heads, head_dim]`, contiguous, on the host.
            heads: of the model, all of them in this pool.
            digest: whether to take it; only for all heads of this pool.
            clear_behind: write zeros behind the last position, to the end of its block: what `scatter`
                writes there for the end of a prompt.

        Returns:
            As `scatter`.

        Raises:
            ValueError: an index, a size or the payload does not fit, or a block is named twice.
        """
        _check_distinct(blocks)
        rows = self._rows(first_layer, end_layer)
        slots = self._slots(blocks, tokens)
        columns = self._columns(heads)
        taken: bytes | None = None
        if heads == self.heads:
            taken = self._scatter(rows, slots, payload, digest=digest)
        elif digest:
            raise ValueError("the digest of a part of the heads is not taken here")
        else:
            part = rows[:, :, :, 0, columns]
            shape = (*part.shape[:2], len(slots), *part.shape[3:])
            source = _view(_writable(payload), shape, self.dtype)
            part.index_copy_(2, slots, source.to(self.device))
        behind = tokens.stop % self.block_size
        if clear_behind and behind:
            last = blocks[tokens.stop // self.block_size]
            self._layers(first_layer, end_layer)[:, :, last, behind:, columns] = 0
        return taken

    def _gather(
        self,
        layers: torch.Tensor,
        indices: torch.Tensor,
        out: memoryview | torch.Tensor,
        valid_tokens: int,
        *,
        digest: bool,
    ) -> bytes | None:
        target = _view(out, self._wire_shape(layers, indices), self.dtype)
        on_host = self.device.type == "cpu"
        staged = target if on_host else torch.empty_like(target, device=self.device)
        taken: bytes | None = None
        if digest and digests_while_copying(layers):
            taken = kv_gather_digest(layers, indices, staged, valid_tokens=valid_tokens)
        else:
            kv_gather(layers, indices, staged, valid_tokens=valid_tokens)
        if on_host:
            return taken
        if target.is_pinned():
            target.copy_(staged)
            return taken
        # A device writes to pageable memory through small bounce buffers; one pinned buffer from
        # torch's cache and a plain copy is faster.
        pinned = torch.empty(target.shape, dtype=self.dtype, pin_memory=True)
        pinned.copy_(staged)
        target.copy_(pinned)
        return taken

    def _scatter(
        self,
        layers: torch.Tensor,
        indices: torch.Tensor,
        payload: memoryview | torch.Tensor,
        *,
        digest: bool,
    ) -> bytes | None:
        source = _view(_writable(payload), self._wire_shape(layers, indices), self.dtype)
        # A blocking copy: the caller may hand the payload's memory to the next message.
        moved = source.to(self.device)
        if digest:
            return kv_scatter_digest(layers, indices, moved)
        kv_scatter(layers, indices, moved)
        return None

    def _layers(self, first_layer: int, end_layer: int) -> torch.Tensor:
        if not 0 <= first_layer < end_layer <= self.num_layers:
            raise ValueError(f"layers [{first_layer}, {end_layer}) of {self.num_layers}")
        return self.tensor[first_layer:end_layer]

    def _rows(self, first_layer: int, end_layer: int) -> torch.Tensor:
        """The same memory as blocks of one token."""
        return self._layers(first_layer, end_layer).flatten(2, 3).unsqueeze(3)

    def _slots(self, blocks: Sequence[int], tokens: range) -> torch.Tensor:
        """Where positions of a sequence lie among `_rows`."""
        if not tokens or tokens.start < 0 or tokens.stop > len(blocks) * self.block_size:
            raise ValueError(f"{tokens} is empty or outside {len(blocks)} blocks")
        positions = torch.arange(tokens.start, tokens.stop, device=self.device)
        block = self._indices(blocks)[positions // self.block_size]
        return block * self.block_size + positions % self.block_size

    def _columns(self, heads: range) -> slice:
        if not heads or heads.start < self.heads.start or heads.stop > self.heads.stop:
            raise ValueError(f"heads {heads} are none, or not among {self.heads}")
        return slice(heads.start - self.heads.start, heads.stop - self.heads.start)

    def _indices(self, blocks: Sequence[int]) -> torch.Tensor:
        if not blocks or min(blocks) < 0 or max(blocks) >= self.num_blocks:
            raise ValueError(f"blocks {list(blocks)} are empty or outside 0..{self.num_blocks - 1}")
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)

    @staticmethod
    def _wire_shape(layers: torch.Tensor, indices: torch.Tensor) -> tuple[int, ...]:
        return (*layers.shape[:2], len(indices), *layers.shape[3:])


def _view(
    buffer: memoryview | torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    flat = (
        buffer if isinstance(buffer, torch.Tensor) else torch.frombuffer(buffer, dtype=torch.uint8)
    )
    expected = math.prod(shape) * dtype.itemsize
    if flat.dtype != torch.uint8 or flat.nbytes != expected:
        raise ValueError(f"the buffer is {flat.nbytes} bytes of {flat.dtype}, not {expected}")
    return flat.view(-1).view(dtype).view(shape)


def _check_distinct(blocks: Sequence[int]) -> None:
    if len(set(blocks)) != len(blocks):
        raise ValueError("a block is named twice")


def _writable(payload: memoryview | torch.Tensor) -> memoryview | torch.Tensor:
    """Torch warns about views of read-only memory even when it only reads: copy those."""
    if isinstance(payload, memoryview) and payload.readonly:
        return memoryview(bytearray(payload))
    return payload
