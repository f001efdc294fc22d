"""What a kernel module declares about its kernels: ahead-of-time compilations and amounts of work.

A module of this package takes part by defining

    def aot_cases() -> list[AotCase]: ...      # compiled for every target by `compile`
    def workloads() -> list[Workload]: ...     # one row of the performance table each

Nothing is registered by import: the package is searched for modules that have them. Every function
decorated with `triton.jit` whose name ends in `_kernel` must be in at least one case and one workload.

A whole example:

    def aot_cases() -> list[AotCase]:
        return [
            AotCase(
                kernel=_silu_mul_kernel,
                variant="bf16, 14336 columns",
                signature={"gate_up": "*bf16", "out": "*bf16", "columns": "i32"},
                constexprs={"BLOCK": 2048},
                divisible=("gate_up", "out", "columns"),
                options={"num_warps": 4},
                expect={
                    80: Expect(instructions={"ld.global 16B": 2}, blocks_per_sm=8),
                    90: Expect(instructions={"ld.global 16B": 2, "griddepcontrol": 1}),
                    100: Expect(),
                },
            )
        ]
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

TARGETS = (80, 90, 100)
"""Compute capabilities the kernels are compiled for: A100, H100 and H200 (sm_90a), B200."""
LAUNCH_US = 1.3
"""What a kernel costs in a captured graph whatever it does."""


@dataclass(frozen=True, slots=True)
class Expect:
    """What one compilation must show; spills and stack frames are never allowed."""

    instructions: Mapping[str, int] = field(default_factory=dict)
    """At least so many in the PTX, by the names in `compile.INSTRUCTIONS`; 0 means none at all."""
    blocks_per_sm: int = 1
    """At least so many programs fit on a multiprocessor, by registers, shared memory and warps."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Compile options of this target alone, over those of the case."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    """Constants of this target alone, over those of the case."""


@dataclass(frozen=True, slots=True)
class AotCase:
    """One specialisation of a kernel as its launcher would compile it."""

    kernel: Any
    """The function decorated with `triton.jit`."""
    variant: str
    """What sets this case apart from the kernel's others, for people."""
    signature: Mapping[str, str]
    """Triton type of every argument that is not a constant: `*bf16`, `*fp8e4nv`, `i32`, `fp32`."""
    constexprs: Mapping[str, Any]
    """Values of the constants; an argument that the launcher passes as None belongs here too."""
    divisible: tuple[str, ...] = ()
    """Arguments known to be divisible by 16: pointers' addresses and integers, as at a launch."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """`num_warps`, `num_stages`, `launch_pdl`, `maxnreg`, ..."""
    expect: Mapping[int, Expect] = field(
        default_factory=lambda: {target: Expect() for target in TARGETS}
    )
    """The targets to compile for, and what each must show."""
    tested: tuple[int, ...] = TARGETS
    """Targets that the test suite compiles too, if this is the kernel's first case; large kernels
    leave some to `kvrelay bench compile-gate`."""

    @property
    def name(self) -> str:
        """The kernel's name without the underscore and the suffix."""
        return str(self.kernel.__name__).strip("_").removesuffix("_kernel")


@dataclass(frozen=True, slots=True)
class Workload:
    """What one call of an op must do at least, whoever writes its kernels: the floor of its time.

    The bytes count every input once and every output once; the operations count a multiply-add as
    two.
    """

    op: str
    kernels: tuple[str, ...]
    """The kernels the call launches, by `AotCase.name`, in order."""
    shape: str
    bytes: int
    flops: int
    expected_share: float
    """Fraction of the floor's rate expected until it is measured, with the reason in `because`."""
    because: str
    dtype: str = "bfloat16"
    latency_us: float = LAUNCH_US
    """Time that no amount of work explains: launches, and loads that wait for other loads."""


def kernel_modules() -> Iterator[ModuleType]:
    """Every module of this package that declares cases, in order of name."""
    import kvrelay_kernels.cuda as package

    for info in pkgutil.iter_modules(package.__path__):
        if info.name in {"registry", "compile"}:
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, "aot_cases"):
            yield module


def all_cases() -> list[AotCase]:
    """The cases of every module."""
    return [case for module in kernel_modules() for case in module.aot_cases()]


def all_workloads() -> list[Workload]:
    """The workloads of every module that declares some."""
    return [
        workload for module in kernel_modules() for workload in getattr(module, "workloads", list)()
    ]
