"""The first step of an engine, and the name of what it computes."""

import hashlib
import json
from pathlib import Path

from kvrelay_engine.batch import Batch, SequenceSlice
from kvrelay_engine.runner import ModelRunner
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_protocol.weights.local import LocalWeights
from kvrelay_protocol.weights.source import SAMPLE_BYTES, WeightSource, sample_offsets


def warm_up(runner: ModelRunner) -> None:
    """Run a prompt and a decode step, so that the first request meets no lazy initialisation.

    Uses block 0 of a pool nobody owns a block of yet; what it leaves there is never read.
    """
    greedy = SamplingParams(temperature=0.0)
    prompt = tuple(0 for _ in range(runner.pool.block_size))
    runner.step(Batch((SequenceSlice(0, prompt, 0, (0,), greedy),)))
    runner.step(Batch((SequenceSlice(0, (0,), runner.pool.block_size - 1, (0,), greedy),)))


def fingerprint(model_dir: Path, source: WeightSource | None = None) -> str:
    """Digest of the config, of every tensor's name, dtype and shape, and of pages sampled from each file.

    Samples rather than whole files, so that naming a checkpoint does not cost a second read of it. The
    same wherever its weights come from.

    Args:
        model_dir: a folder with `config.json`.
        source: where the weights come from; None: the folder.
    """
    source = source or LocalWeights(model_dir)
    digest = hashlib.blake2b(digest_size=16)
    config = json.loads((model_dir / "config.json").read_text())
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file, size in sorted(source.files.items()):
        digest.update(file.encode())
        digest.update(size.to_bytes(8, "little"))
        tensors = [(name, t) for name, t in source.tensors.items() if t.file == file]
        for name, tensor in sorted(tensors):
            digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(_sample(source, file, size))
    return digest.hexdigest()


def _sample(source: WeightSource, file: str, size: int) -> bytes:
    """Evenly spaced pages of a file: other weights of the same shapes give another digest."""
    digest = hashlib.blake2b(digest_size=16)
    for start in sample_offsets(size):
        digest.update(source.read_range(file, start, SAMPLE_BYTES))
    return digest.digest()
