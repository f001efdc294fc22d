"""ctypes side of sampling.cpp and greedy.cpp."""

import ctypes
from typing import ClassVar

import torch

from kvrelay_kernels.cpu.library import Count, CpuLibrary, OpArgs


class GreedyArgs(OpArgs):
    """Mirror of `kvr::greedy_args`."""

    op = "greedy"
    _fields_: ClassVar = [
        ("rows", Count),
        ("vocabulary", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
    ]


class SampleArgs(OpArgs):
    """Mirror of `kvr::sample_args`."""

    op = "sample"
    _fields_: ClassVar = [
        ("rows", Count),
        ("vocabulary", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("temperature", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p", ctypes.c_void_p),
        ("uniform", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
    ]


class IntegerWeightsArgs(OpArgs):
    """Mirror of `kvr::integer_weights_args`."""

    op = "integer_weights"
    _fields_: ClassVar = [
        ("rows", Count),
        ("vocabulary", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("temperature", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    ]


def greedy_cpu(library: CpuLibrary, logits: torch.Tensor) -> torch.Tensor:
    """`kvrelay_kernels.sampling.greedy` of float32 logits with contiguous rows."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    library.run(
        GreedyArgs(
            rows=Count(rows, None),
            vocabulary=vocabulary,
            logits=logits.data_ptr(),
            stride=logits.stride(0),
            tokens=tokens.data_ptr(),
        )
    )
    return tokens


def sample_cpu(
    library: CpuLibrary,
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """`kvrelay_kernels.sampling.sample` of float32 logits with contiguous rows."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    # A strided view of parameters is copied; the names keep the copies alive during the call.
    columns = [column.contiguous() for column in (temperature, top_k, top_p, min_p, uniform)]
    pointers = [column.data_ptr() for column in columns]
    library.run(
        SampleArgs(
            rows=Count(rows, None),
            vocabulary=vocabulary,
            logits=logits.data_ptr(),
            stride=logits.stride(0),
            temperature=pointers[0],
            top_k=pointers[1],
            top_p=pointers[2],
            min_p=pointers[3],
            uniform=pointers[4],
            tokens=tokens.data_ptr(),
        )
    )
    return tokens


def integer_weights_cpu(
    library: CpuLibrary, logits: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """`kvrelay_kernels.reference.sampling.integer_weights` of float32 logits, contiguous."""
    weights = torch.empty(logits.shape, dtype=torch.int64)
    library.run(
        IntegerWeightsArgs(
            rows=Count(logits.shape[0], None),
            vocabulary=logits.shape[1],
            logits=logits.data_ptr(),
            stride=logits.stride(0),
            temperature=temperature.data_ptr(),
            weights=weights.data_ptr(),
        )
    )
    return weights
