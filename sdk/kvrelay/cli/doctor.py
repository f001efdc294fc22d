"""`kvrelay doctor`: everything a bug report needs, as plain text without secrets."""

import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

from kvrelay.cli.settings import relevant_environment
from kvrelay.cli.units import format_size
from kvrelay_infra.host import (
    query_nvidia_smi,
    read_cgroup,
    read_cores,
    read_memory,
)
from kvrelay_protocol.errors import KvrelayError

_PACKAGES = ("kvrelay", "torch", "triton", "ucxx-cu13", "libucx-cu13", "grpcio", "protobuf",
             "fastapi", "uvicorn", "httpx", "tokenizers", "transformers", "opentelemetry-sdk")  # fmt: skip
_NEEDED = ("torch", "ucxx-cu13", "grpcio", "fastapi", "uvicorn", "tokenizers")


def run_doctor(values: SimpleNamespace) -> int:
    """Print the report; 0 when a stack can run here, otherwise 1."""
    problems: list[str] = []
    # Before the probe: UCX's Python package sets some of these itself.
    environment = relevant_environment()
    sections: list[tuple[str, Callable[[], Iterator[str]]]] = [
        ("versions", lambda: _versions(problems)),
        ("machine", _machine),
        ("devices", lambda: _devices(problems)),
        ("limits", _limits),
        ("environment", lambda: _environment(environment)),
    ]
    if not values.skip_probe:
        sections.insert(-1, ("transport", lambda: _transport(problems)))
    for title, lines in sections:
        print(f"{title}")
        for line in lines():
            print(f"  {line}", flush=True)
    print("verdict")
    for problem in problems or ["ok: router, prefill and decode workers can run here"]:
        print(f"  {problem}")
    return 1 if problems else 0


def _versions(problems: list[str]) -> Iterator[str]:
    yield _pair("python", f"{platform.python_version()} {sys.executable}")
    for package in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
            if package in _NEEDED:
                problems.append(f"{package} is not installed: pip install 'kvrelay[all]'")
        yield _pair(package, found)


def _machine() -> Iterator[str]:
    yield _pair("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield _pair("libc", " ".join(platform.libc_ver()) or "unknown")
    yield _pair("cores", f"{read_cores()} usable")
    memory = read_memory()
    yield _pair("memory", f"{format_size(memory.available)} of {format_size(memory.total)} free")


def _devices(problems: list[str]) -> Iterator[str]:
    listed = query_nvidia_smi(
        "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
    )
    gpus = [line.strip() for line in (listed or "").splitlines() if line.strip()]
    for index, line in enumerate(gpus):
        yield _pair(f"gpu {index}", line)
    if not gpus:
        yield _pair("gpu", "none, the CPU is used")
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"torch does not load: {error}")
        return
    cuda = torch.cuda.is_available()
    yield _pair(
        "torch cuda", f"{torch.version.cuda or 'CPU build'}, {'usable' if cuda else 'not usable'}"
    )
    from kvrelay_kernels.cpu.library import cpu_library

    yield _pair("cpu kernels", "torch, which is slower" if cpu_library() is None else "compiled")
    if gpus and not cuda:
        yield _pair("note", "the driver shows a GPU that this torch can't use")


def _limits() -> Iterator[str]:
    import resource

    limits = read_cgroup()
    yield _pair("cgroup", f"v{limits.version}")
    yield _pair("cpu quota", f"{limits.cores:g} cores" if limits.cores else "none")
    yield _pair("memory", format_size(limits.memory) if limits.memory else "no limit")
    for label, name in (
        ("open files", resource.RLIMIT_NOFILE),
        ("locked", resource.RLIMIT_MEMLOCK),
        ("processes", resource.RLIMIT_NPROC),
    ):
        soft, hard = resource.getrlimit(name)
        yield _pair(label, f"{_limit(soft)} soft, {_limit(hard)} hard")
    yield _pair("shared memory", _shared_memory())


def _shared_memory() -> str:
    import os

    try:
        status = os.statvfs("/dev/shm")  # noqa: S108  # its size, nothing is written
    except OSError:
        return "missing"
    return f"{format_size(status.f_bavail * status.f_frsize)} free"


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)


def _transport(problems: list[str]) -> Iterator[str]:
    try:
        from kvrelay_transfer.probe import probe
    except ModuleNotFoundError as error:
        yield _pair("ucx", f"not measured, {error.name} is missing")
        return
    try:
        result = probe()
    except KvrelayError as error:
        problems.append(f"transport: {error.message}")
        yield _pair("ucx", f"failed: {error.message}")
        return
    except Exception as error:
        problems.append(f"transport: {type(error).__name__}: {error}")
        yield _pair("ucx", f"failed: {error}")
        return
    yield _pair("ucx", f"{result.transport} between two local processes")
    for size, rate in result.gb_per_s.items():
        yield _pair(f"speed {format_size(size)}", f"{rate:.2f} GB/s")
    yield _pair("latency 4 KiB", f"{result.latency_us:.0f} us one way")


def _environment(found: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not found:
        yield "nothing set"
    for name, value in found:
        yield f"{name}={value}"


def _pair(name: str, value: str) -> str:
    return f"{name:<18}{value}"
