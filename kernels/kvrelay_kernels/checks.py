"""Shape and dtype checks shared by the ops: one clear line instead of a failure deep inside torch."""

import torch


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has the expected shape; None matches any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(
        want is not None and have != want for have, want in zip(shape, expected, strict=True)
    ):
        wanted = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {list(shape)}, expected [{wanted}]")


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {names}")
