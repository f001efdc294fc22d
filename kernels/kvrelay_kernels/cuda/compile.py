"""The compile gate: every kernel built ahead of time for every target, and its machine code checked.

`python -m kvrelay_kernels.cuda.compile [SUBSTRING]` prints a table. Neither a GPU nor a driver is
needed: Triton brings LLVM, ptxas and cuobjdump. How a kernel takes part is in `registry`.

Spilled registers and stack frames fail, as do missing instructions and too few programs per
multiprocessor. What the gate can't see is time.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvrelay_kernels.cuda.registry import AotCase, all_cases

INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "mma.sync": r"\bmma\.sync\b",
    "cp.async": r"\bcp\.async\.c[ag]\.",
    "cp.async 16B": r"\bcp\.async\.c[ag]\.\S+ \[[^\]]*\], \[[^\]]*\], 0x10\b",
    "tma": r"\bcp\.async\.bulk\.tensor\b",
    "setmaxnreg": r"\bsetmaxnreg\b",
    "griddepcontrol": r"\bgriddepcontrol\b",
    "ld.global 16B": r"\bld\.global\S*\.(v4\.b32|v2\.b64|v4\.f32|b128)\b",
    "st.global 16B": r"\bst\.global\S*\.(v4\.b32|v2\.b64|v4\.f32|b128)\b",
    "atom": r"\batom\.",
    "fma.f64": r"\bfma\.rn\.f64\b",
}
"""Patterns of PTX that expectations may name."""


@dataclass(frozen=True, slots=True)
class _Limits:
    """What one multiprocessor has; CUDA C++ Programming Guide, "Technical Specifications"."""

    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


_LIMITS = {80: _Limits(164 << 10), 90: _Limits(228 << 10), 100: _Limits(228 << 10)}
_RESERVED_SHARED_BYTES = 1024
"""Kept by the system for every resident block."""
_REGISTER_UNIT = 256
"""Registers are given to a warp in steps of this."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one case became on one target."""

    kernel: str
    variant: str
    target: int
    threads: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    instructions: dict[str, int]
    failures: tuple[str, ...]


def compile_case(case: AotCase, target: int) -> Compiled:
    """Compile one case for one target and compare it with what the case expects."""
    expect = case.expect[target]
    options = {**case.options, **expect.options}
    kernel = _compile(case, target, {**case.constexprs, **expect.constexprs}, options)
    ptx: str = kernel.asm["ptx"]
    usage = _resource_usage(kernel.asm["cubin"])
    threads = int(_search(r"\.(?:reqntid|maxntid) (\d+)", ptx))
    registers = usage["REG"]
    shared = usage["SHARED"] + kernel.metadata.shared
    blocks = blocks_per_sm(target, threads=threads, registers=registers, shared_bytes=shared)
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()}
    failures = [
        f"{name}: {counts[name]}, expected {f'at least {least}' if least else 'none'}"
        for name, least in expect.instructions.items()
        if (counts[name] < least if least else counts[name])
    ]
    if usage["STACK"] or usage["LOCAL"]:
        failures.append(f"{usage['STACK'] + usage['LOCAL']} bytes of stack (spilled registers)")
    if blocks < expect.blocks_per_sm:
        failures.append(f"{blocks} programs per SM, expected at least {expect.blocks_per_sm}")
    return Compiled(
        kernel=case.name,
        variant=case.variant,
        target=target,
        threads=threads,
        registers=registers,
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=shared,
        blocks_per_sm=blocks,
        instructions={name: count for name, count in counts.items() if count},
        failures=tuple(failures),
    )


def blocks_per_sm(target: int, *, threads: int, registers: int, shared_bytes: int) -> int:
    """Programs resident on one multiprocessor: the least of what its resources allow."""
    limits = _LIMITS[target]
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // (warp_registers * warps),
        limits.shared_bytes // (shared_bytes + _RESERVED_SHARED_BYTES),
    )


def _compile(
    case: AotCase, target: int, constexprs: dict[str, Any], options: dict[str, Any]
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = set(names) - set(case.signature) - set(constexprs)
    if missing:
        raise ValueError(f"{case.name} ({case.variant}): no type or value for {sorted(missing)}")
    source = ASTSource(
        fn=case.kernel,
        signature={
            name: "constexpr" if name in constexprs else case.signature[name] for name in names
        },
        constexprs=constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the only function in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}


@cache
def _cuobjdump() -> str:
    import triton.backends.nvidia as backend

    return str(Path(next(iter(backend.__path__))) / "bin" / "cuobjdump")


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return match[1]


def main(arguments: Sequence[str]) -> int:
    """Compile the cases whose kernel contains the argument, or all; 1 if any fails."""
    failed = 0
    for case in all_cases():
        if arguments and arguments[0] not in case.name:
            continue
        for target in case.expect:
            done = compile_case(case, target)
            failed += bool(done.failures)
            print(_line(done))
    return 1 if failed else 0


def _line(done: Compiled) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in done.instructions.items())
    verdict = "; ".join(done.failures) or "ok"
    return (
        f"{done.kernel:<22} {done.variant:<34} sm_{done.target:<4} {done.registers:>3} regs "
        f"{done.shared_bytes / 1024:>6.1f} KB  {done.blocks_per_sm:>2}/SM  {counts}  {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
