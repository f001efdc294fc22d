"""Which number format a model is stored in. Imports no torch: start-up checks use it too."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def resolve_dtype(dtype: str, checkpoint_dtype: str) -> str:
    """Name of the dtype that weights and KV are stored in.

    `auto` is the checkpoint's own: on a GPU it is also what is computed in, on a CPU the compiled
    kernels read it and compute in float32.

    Raises:
        ValueError: `dtype` is none of the names.
    """
    if dtype != "auto":
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPE_BYTES)}")
        return dtype
    return checkpoint_dtype if checkpoint_dtype in DTYPE_BYTES else "float32"
