"""The compiled kernels as Python callables, and the choice between them and torch."""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch

from kvrelay_kernels.cpu.build import NoCompiler, build_library

log = logging.getLogger(__name__)

FORMATS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.int16: 4,
}
"""How the C++ side numbers storage formats (`Format` in ops.hpp)."""


class NotNative(Exception):
    """An op that is being recorded has no compiled kernel for these tensors."""


class Count(ctypes.Structure):
    """`kvr::Count`: a size that is given now, or read from `live` whenever the op runs."""

    _fields_: ClassVar = [("given", ctypes.c_int64), ("live", ctypes.c_void_p)]


class OpArgs(ctypes.Structure):
    """Arguments of one op; a subclass mirrors the C++ struct `NAME_args` field by field."""

    op: ClassVar[str]
    """NAME in `KVR_OP(NAME)`."""


class _Recording(threading.local):
    """What this thread is recording, if it is: another thread's step must not land on its tape."""

    calls: list[OpArgs] | None = None
    rows: int | None = None


class CpuLibrary:
    """The loaded shared library. Ops run on the calling thread and on the library's own threads.

    Ops may be called from any thread; one parallel loop uses the threads at a time, and a second
    caller computes alone meanwhile.
    """

    def __init__(self, path: str) -> None:
        # The GIL is released during a call: tokens are written to sockets while a step computes.
        self._handle = ctypes.CDLL(path)
        self._functions: dict[type[OpArgs], ctypes._NamedFuncPointer] = {}
        self._recording = _Recording()

    def run(self, args: OpArgs) -> None:
        """Run the op that `args` belongs to, or add it to the tape that this thread records."""
        if self._recording.calls is not None:
            self._recording.calls.append(args)
            return
        self.function(type(args))(ctypes.byref(args))

    def rows(self, tensor: torch.Tensor) -> Count:
        """The size of the first dimension; while a tape is recorded, whatever its replay will say."""
        return Count(tensor.shape[0], self._recording.rows)

    @property
    def is_recording(self) -> bool:
        """Whether this thread is."""
        return self._recording.calls is not None

    @contextmanager
    def recording(self, calls: list[OpArgs], rows: int) -> Iterator[None]:
        """Collect this thread's ops instead of running them; `rows` is the address of their row count."""
        self._recording.calls, self._recording.rows = calls, rows
        try:
            yield
        finally:
            self._recording.calls, self._recording.rows = None, None

    def function(self, kind: type[OpArgs]) -> "ctypes._NamedFuncPointer":
        """The C function of an op.

        Raises:
            RuntimeError: the C++ struct has another size than its mirror.
        """
        found = self._functions.get(kind)
        if found is None:
            size = self._handle[f"kvr_{kind.op}_args_size"]
            size.restype = ctypes.c_int64
            if size() != ctypes.sizeof(kind):
                raise RuntimeError(
                    f"{kind.__name__} has {ctypes.sizeof(kind)} bytes, the library expects {size()}"
                )
            found = self._handle[f"kvr_{kind.op}"]
            found.argtypes = [ctypes.POINTER(kind)]
            found.restype = None
            self._functions[kind] = found
        return found

    @functools.cached_property
    def prefers_int16(self) -> bool:
        """Whether this CPU multiplies bfloat16 weights faster as 16-bit integers with block scales."""
        return bool(self._handle.kvr_prefers_int16())

    def set_threads(self, threads: int) -> None:
        """How many threads an op uses, the caller included; at least 1."""
        self._handle.kvr_set_threads(ctypes.c_int64(threads))

    @property
    def threads(self) -> int:
        return int(self._handle.kvr_thread_count())


@functools.cache
def cpu_library() -> CpuLibrary | None:
    """The kernels of this machine; None where they cannot be built, or `KVRELAY_CPU_KERNELS=torch`.

    The first call builds them unless they are cached, and says so; later calls cost nothing.
    """
    if os.environ.get("KVRELAY_CPU_KERNELS", "") == "torch":
        return None
    try:
        return CpuLibrary(str(build_library()))
    except (NoCompiler, OSError) as error:
        log.warning("%s; computing with torch instead, which is slower", error)
        return None


def native(*tensors: torch.Tensor | None, supported: bool = True) -> CpuLibrary | None:
    """The library, if it can take these tensors: on the CPU, in float32, rows contiguous.

    Args:
        tensors: the activations of the op.
        supported: False where the kernel has another limit that these arguments exceed.

    Raises:
        NotNative: it can't, and this thread is recording a tape: torch would not be on it.
    """
    library = cpu_library()
    fits = supported and all(
        tensor is None
        or (
            tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.stride(-1) == 1
        )
        for tensor in tensors
    )
    if fits or library is None:
        return library
    if library.is_recording:
        raise NotNative
    return None
