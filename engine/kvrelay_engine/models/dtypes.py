"""Which number format a model computes in. Imports no torch: start-up checks use it too."""

from pathlib import Path

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def resolve_dtype(dtype: str, checkpoint_dtype: str, *, on_gpu: bool) -> str:
    """Name of the dtype to compute in.

    `auto` is the checkpoint's own on an accelerator. On a CPU it is bfloat16 where the checkpoint is
    and the CPU multiplies it natively, otherwise float32: emulated 16-bit arithmetic is slower.

    Raises:
        ValueError: `dtype` is none of the names.
    """
    if dtype != "auto":
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPE_BYTES)}")
        return dtype
    stored = checkpoint_dtype if checkpoint_dtype in DTYPE_BYTES else "float32"
    if on_gpu:
        return stored
    return stored if stored == "bfloat16" and cpu_has_bfloat16() else "float32"


def cpu_has_bfloat16(root: Path = Path("/")) -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16, AMX or Arm BF16)."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    names = {"avx512_bf16", "amx_bf16", "bf16"}
    flags = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return any(names & set(line.split()) for line in flags)
