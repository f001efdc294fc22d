"""The first step of an engine, and the name of what it computes."""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

from kvrelay_engine.batch import Batch, SequenceSlice
from kvrelay_engine.runner import ModelRunner
from kvrelay_protocol.sampling import SamplingParams


def warm_up(runner: ModelRunner) -> None:
    """Run a prompt and a decode step, so that the first request meets no lazy initialisation.

    Uses block 0 of a pool nobody owns a block of yet; what it leaves there is never read.
    """
    greedy = SamplingParams(temperature=0.0)
    prompt = tuple(0 for _ in range(runner.pool.block_size))
    runner.step(Batch((SequenceSlice(0, prompt, 0, (0,), greedy),)))
    runner.step(Batch((SequenceSlice(0, (0,), runner.pool.block_size - 1, (0,), greedy),)))


def fingerprint(model_dir: Path) -> str:
    """Digest of the config, of every tensor's name, dtype and shape, and of pages sampled from each file.

    Samples rather than whole files, so that naming a checkpoint does not cost a second read of it.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = json.loads((model_dir / "config.json").read_text())
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(model_dir.glob("*.safetensors")):
        digest.update(path.name.encode())
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with safe_open(path, framework="np") as tensors:
            for name in sorted(tensors.keys()):
                part = tensors.get_slice(name)
                digest.update(f"{name}:{part.get_dtype()}:{part.get_shape()}".encode())
        digest.update(_sample(path))
    return digest.hexdigest()


def _sample(path: Path, count: int = 64, size: int = 4096) -> bytes:
    """Evenly spaced pages of a file: other weights of the same shapes give another digest."""
    total = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for index in range(count):
            file.seek(index * max(total - size, 0) // max(count - 1, 1))
            digest.update(file.read(size))
    return digest.digest()
