"""A model whose KV says what it was computed from, and the step loop without its thread."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvrelay_engine.batch import Batch, StepResult
from kvrelay_engine.cache.allocator import BlockAllocator, BlockState
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.models.config import parse_model_config
from kvrelay_engine.runtime.step_loop import StepLoop
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.versions import KV_VERSION

LAYERS = 2
VOCAB = 16
STOP = 2
HEAD_DIM = 8
MAX_MODEL_LEN = 24
FINGERPRINT = "simulated"


def layout_of(block_size: int) -> pb.KvLayout:
    """One head: 64 bytes a token and layer."""
    return pb.KvLayout(
        model_fingerprint=FINGERPRINT,
        dtype="float32",
        block_size=block_size,
        num_layers=LAYERS,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        protocol_version=KV_VERSION,
    )


CONFIG = parse_model_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HEAD_DIM,
        "intermediate_size": 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
    }
)


@functools.lru_cache(maxsize=100_000)
def kv_of(salt: bytes, tokens: tuple[int, ...], layer: int) -> npt.NDArray[np.float32]:
    """`[2, HEAD_DIM]`: key and value of the last of these tokens, noise made of tenant, prompt and layer."""
    noise = hashlib.shake_128(repr((salt, tokens, layer)).encode()).digest(4 * HEAD_DIM)
    return np.frombuffer(noise, np.uint16).astype(np.float32).reshape(2, HEAD_DIM)


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after these; now and then, the stop token."""
    noise = hashlib.shake_128(repr(tuple(tokens)).encode()).digest(8)
    return STOP + int.from_bytes(noise, "big") % (VOCAB - STOP)


def answer_to(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The undisturbed run."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


class CheckedPool(KVPool):
    """Copies only from blocks somebody holds, and only into blocks promised to a transfer."""

    def __init__(self, allocator: BlockAllocator, defects: list[str]) -> None:
        """Args: `defects` takes what was found; an exception might be lost with a cancelled copy."""
        super().__init__(
            CONFIG,
            num_blocks=allocator.num_blocks,
            block_size=allocator.block_size,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        self._allocator = allocator
        self._defects = defects

    def gather(self, first_layer: int, end_layer: int, blocks: Any, *args: Any, **kw: Any) -> Any:
        self._may_read(blocks)
        return super().gather(first_layer, end_layer, blocks, *args, **kw)

    def gather_tokens(
        self, first_layer: int, end_layer: int, blocks: Any, *args: Any, **kw: Any
    ) -> Any:
        self._may_read(blocks)
        return super().gather_tokens(first_layer, end_layer, blocks, *args, **kw)

    def scatter(self, first_layer: int, end_layer: int, blocks: Any, *args: Any, **kw: Any) -> Any:
        self._may_write(blocks)
        return super().scatter(first_layer, end_layer, blocks, *args, **kw)

    def scatter_tokens(
        self, first_layer: int, end_layer: int, blocks: Any, tokens: range, *args: Any, **kw: Any
    ) -> Any:
        size = self.block_size
        self._may_write(blocks[tokens.start // size : -(-tokens.stop // size)])
        return super().scatter_tokens(first_layer, end_layer, blocks, tokens, *args, **kw)

    def _may_read(self, blocks: Sequence[int]) -> None:
        self._expect(blocks, BlockState.IN_USE, "a send reads")

    def _may_write(self, blocks: Sequence[int]) -> None:
        self._expect(blocks, BlockState.LEASED, "a receive writes")

    def _expect(self, blocks: Sequence[int], right: BlockState, who: str) -> None:
        for block in blocks:
            state = self._allocator._state[block]
            if state is not right:
                self._defects.append(f"{who} block {block}, which is {state.name}")


class SimRunner:
    """Reads and writes the pool as a model would. Reading what is not the prompt's own KV is the failure
    that everything here is about.
    """

    def __init__(self, pool: CheckedPool, between_layers: Callable[[], None]) -> None:
        self.pool = pool
        self.config = CONFIG
        self.known: dict[int, tuple[bytes, list[int]]] = {}
        """Salt and tokens of every sequence that was submitted, as far as this worker was told them."""
        self._between_layers = between_layers
        self._kv = pool.tensor.numpy()[..., 0, :]
        """`[layers, 2, blocks, block_size, HEAD_DIM]`."""

    def submitted(self, own: int, sequence: pb.Sequence) -> None:
        self.known[own] = (sequence.cache_salt, list(sequence.tokens))

    def step(
        self,
        batch: Batch,
        layers_done: Callable[[int, int], None] | None = None,
        layers_per_group: int = LAYERS,
    ) -> StepResult:
        for part in batch.slices:
            tokens = self.known[part.sequence_id][1]
            tokens[part.start :] = part.tokens
        for layer in range(LAYERS):
            for part in batch.slices:
                self._check(layer, part)
                self._write(layer, part)
            done = layer + 1
            if layers_done is not None and (done % layers_per_group == 0 or done == LAYERS):
                layers_done(done - ((done - 1) % layers_per_group + 1), done)
                if done < LAYERS:
                    self._between_layers()
        return StepResult(
            {
                part.sequence_id: next_token(self.known[part.sequence_id][1])
                for part in batch.slices
                if part.sampling is not None
            }
        )

    def _check(self, layer: int, part: Any) -> None:
        salt, tokens = self.known[part.sequence_id]
        for position in range(part.start):
            block = part.block_table[position // self.pool.block_size]
            found = self._kv[layer, :, block, position % self.pool.block_size]
            right = kv_of(salt, tuple(tokens[: position + 1]), layer)
            assert np.array_equal(found, right), (
                f"sequence {part.sequence_id:x} reads position {position} of layer {layer} in block "
                f"{block}, and finds what is not its prompt's"
            )

    def _write(self, layer: int, part: Any) -> None:
        salt, tokens = self.known[part.sequence_id]
        for position in range(part.start, part.start + len(part.tokens)):
            block = part.block_table[position // self.pool.block_size]
            self._kv[layer, :, block, position % self.pool.block_size] = kv_of(
                salt, tuple(tokens[: position + 1]), layer
            )


class SimStepLoop(StepLoop):
    """`StepLoop._turn` in two halves, so that a test decides what happens while a step runs."""

    running: Batch | None = None
    parked: bool = False
    """Found nothing to do; a command wakes it."""

    @property
    def runnable(self) -> bool:
        return self.running is not None or not self.parked or not self._commands.empty()

    def turn(self) -> None:
        if self.running is None:
            self._begin()
        else:
            self._end(self.running)

    def _begin(self) -> None:
        self._run_commands(wait=False)
        batch = self._scheduler.schedule()
        self._publish()
        self.running, self.parked = batch, batch is None
        if batch is None:
            self._scheduler.check_integrity()

    def _run_commands(self, *, wait: bool) -> None:
        if not self._commands.empty():
            super()._run_commands(wait=False)

    def _end(self, batch: Batch) -> None:
        self._scheduler.commit(batch, self._step(batch))
        self._publish()
        self.running = None
