"""Recording a step's ops once and replaying them in one call: what a CUDA graph is to a GPU.

A step of a small model is hundreds of ops of a few microseconds. Called one by one from Python, each
costs about as much again, and each gives another thread the chance to take the interpreter for
milliseconds. The recorded calls keep their pointers, so every tensor they use must stay where it is;
what differs between steps (rows, sequences, block tables) is read through pointers when they run.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from kvrelay_kernels.cpu.library import CpuLibrary, OpArgs


class _Call(ctypes.Structure):
    """Mirror of `kvr::call`."""

    _fields_: ClassVar = [("op", ctypes.c_void_p), ("args", ctypes.c_void_p)]


class ReplayArgs(OpArgs):
    """Mirror of `kvr::replay_args`."""

    op = "replay"
    _fields_: ClassVar = [
        ("calls", ctypes.POINTER(_Call)),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
    ]


class Tape:
    """Ops in the order they were recorded. Owns their arguments, not the tensors these point to."""

    def __init__(self, library: CpuLibrary) -> None:
        self._library = library
        self._rows = ctypes.c_int64(0)
        self._args: list[OpArgs] = []
        self._calls: ctypes.Array[_Call] = (_Call * 0)()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Ops called by this thread are recorded, and not run."""
        with self._library.recording(self._args, ctypes.addressof(self._rows)):
            yield
        address = [
            ctypes.cast(self._library.function(type(args)), ctypes.c_void_p) for args in self._args
        ]
        self._calls = (_Call * len(self._args))(
            *(
                _Call(op.value, ctypes.addressof(args))
                for op, args in zip(address, self._args, strict=True)
            )
        )

    def __len__(self) -> int:
        return len(self._args)

    def replay(self, rows: int, begin: int, end: int) -> None:
        """Run the recorded ops `[begin, end)` on the first `rows` rows of their tensors."""
        self._rows.value = rows
        self._library.run(ReplayArgs(self._calls, begin, end))
