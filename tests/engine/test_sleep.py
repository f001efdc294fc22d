"""A model that sleeps gives its memory back, and computes the same when it is awake again."""

import gc
import weakref
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import clear_case, tiny_model

from kvrelay_engine import runner as runner_module
from kvrelay_engine.batch import Batch, SequenceSlice
from kvrelay_engine.cache.allocator import BlockAllocator
from kvrelay_engine.cache.memory import HostMemory
from kvrelay_engine.cache.pool import KVPool
from kvrelay_engine.loading import load_engine
from kvrelay_engine.models.placement import copied_weights
from kvrelay_engine.models.resident import ResidentWeights
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_protocol.weights.local import LocalWeights

BLOCK = 16
MIB = 1 << 20
GREEDY = SamplingParams(temperature=0.0)
NEW_TOKENS = 6


def resident(tensor: torch.Tensor) -> int:
    """Bytes of the mapping around a tensor that have a page (proc(5), smaps)."""
    inside, rss = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            first, end = (int(part, 16) for part in head.split("-"))
            inside = first < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end
        elif inside and head == "Rss:":
            rss += int(line.split()[1]) * 1024
    return rss


def make_runner(**options):
    return load_engine(
        tiny_model("llama3"), device="cpu", num_blocks=64, block_size=BLOCK,
        **({"dtype": "float32"} | options),
    )  # fmt: skip


def generate(runner, prompt, table):
    """Greedy tokens; the pool holds nothing of the prompt yet."""
    known, computed = list(prompt), 0
    while len(known) < len(prompt) + NEW_TOKENS:
        part = SequenceSlice(1, tuple(known[computed:]), computed, table, GREEDY)
        computed = len(known)
        known.append(runner.step(Batch((part,))).tokens[1])
    return known[len(prompt) :]


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_of(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def test_memory_goes_back_to_the_system_and_reads_as_zeros_where_it_was():
    memory = HostMemory(64 * MIB)
    address = memory.tensor.data_ptr()
    assert resident(memory.tensor) < MIB
    for _ in range(2):
        memory.tensor.fill_(7)
        assert resident(memory.tensor) >= 64 * MIB
        memory.release()
        assert resident(memory.tensor) < MIB
        assert memory.tensor.data_ptr() == address
        assert not memory.tensor.any()


def test_a_released_pool_takes_no_memory_until_its_blocks_are_used():
    runner = make_runner()
    config, cpu = runner.config, torch.device("cpu")
    pool = KVPool(config, num_blocks=2048, block_size=BLOCK, device=cpu, dtype=torch.float32)
    pool.tensor.fill_(1.0)
    assert resident(pool.tensor) >= pool.nbytes == pool.tensor.nbytes
    pool.release()
    assert resident(pool.tensor) < MIB < pool.nbytes
    pool.restore()
    assert resident(pool.tensor) < MIB
    assert not pool.tensor.any()


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_what_is_generated_is_the_same_before_and_after(options):
    runner = make_runner(**options)
    prompt, table = clear_case(tiny_model("llama3"), 40, NEW_TOKENS)[0], tuple(range(3, 6))
    before = generate(runner, prompt, table)
    runner.sleep()
    assert not runner.pool.tensor.any()
    runner.wake()
    assert generate(runner, prompt, tuple(reversed(table))) == before


def test_a_model_that_sleeps_refuses_to_compute():
    runner = make_runner()
    runner.sleep()
    runner.sleep()
    with pytest.raises(RuntimeError, match="sleeps"):
        generate(runner, (1, 2, 3), (0,))
    runner.wake()
    runner.wake()
    assert len(generate(runner, (1, 2, 3), (0,))) == NEW_TOKENS


def test_where_weights_move_nothing_is_left_of_pool_and_recording(monkeypatch):
    """The way of a device, with a copy on this one in place of page-locked memory."""
    monkeypatch.setattr(runner_module, "pinned", torch.clone)
    runner = make_runner()
    prompt, table = clear_case(tiny_model("llama3"), 40, NEW_TOKENS)[0], tuple(range(3))
    before = generate(runner, prompt, table)
    runner._weights_move, runner.pool._memory = True, None
    awake = runner.decoder
    runner.sleep()
    assert runner.pool.tensor.numel() == 0
    assert runner._forward is None
    assert runner.decoder is not awake
    runner.wake()
    assert runner.pool.tensor.shape[2] == 64
    assert generate(runner, prompt, table) == before


def test_sharing_weights_keeps_none_of_them_on_the_device(monkeypatch):
    monkeypatch.setattr(runner_module, "pinned", torch.clone)
    runner = make_runner()
    source = LocalWeights(tiny_model("llama3"))
    shared = ResidentWeights(lambda: runner.decoder.weights, runner.config, source)
    stored = source.tensors["model.norm.weight"]
    on_device = weakref.ref(runner.decoder.weights.embedding)
    runner._weights_move = True
    runner.sleep()
    gc.collect()
    assert on_device() is None
    into = bytearray(stored.end - stored.start)
    shared.read(stored.file, stored.start, memoryview(into))
    assert into == source.read_range(stored.file, stored.start, stored.end)


def test_a_host_without_room_for_the_weights_leaves_the_model_as_it_was(monkeypatch):
    def full(_tensor):
        raise RuntimeError("out of host memory")

    monkeypatch.setattr(runner_module, "pinned", full)
    runner = make_runner()
    runner._weights_move = True
    with pytest.raises(RuntimeError, match="out of host memory"):
        runner.sleep()
    assert not runner.asleep
    assert len(generate(runner, (1, 2, 3), (0,))) == NEW_TOKENS


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_every_tensor_of_the_weights_is_copied(family, quantization):
    runner = load_engine(
        tiny_model(family), device="cpu", dtype="float32", num_blocks=2, block_size=BLOCK,
        quantization=quantization,
    )  # fmt: skip
    before = list(tensors_of(runner.decoder.weights))
    after = list(tensors_of(copied_weights(runner.decoder.weights, torch.clone)))
    assert len(after) == len(before) > 10
    for mine, copy in zip(before, after, strict=True):
        assert copy.data_ptr() != mine.data_ptr()
        assert torch.equal(copy, mine)


def test_clearing_frees_what_is_cached_and_leaves_what_is_used():
    allocator = BlockAllocator(8, BLOCK)
    used, done = allocator.allocate(2), allocator.allocate(3)
    for number, block in enumerate((*used.blocks, *done.blocks)):
        allocator.publish(block, bytes([number]))
    allocator.release(done.blocks)
    assert (allocator.counts.cached, allocator.counts.free) == (3, 3)
    allocator.clear()
    allocator.check_integrity()
    assert (allocator.counts.cached, allocator.counts.free, allocator.counts.in_use) == (0, 6, 2)
    assert allocator.match([bytes([2])]) == 0
    assert allocator.match([bytes([0]), bytes([1])]) == 2
    assert allocator.allocate(6) is not None
