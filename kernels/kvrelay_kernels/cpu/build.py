"""Compiling the C++ kernels for this machine: once for each source, compiler and CPU, then cached."""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Sums are written in the order they are meant in; only a * b + c may become one instruction.
    "-ffp-contract=fast",
    # Nobody reads them here; vector types crossing inlined calls and intrinsics cause hundreds.
    "-w",
)
_TIMEOUT_S = 600.0


class NoCompiler(Exception):
    """The kernels cannot be built here; the message says why."""


def build_library() -> Path:
    """Path of the compiled kernels, built now unless an equal build is cached.

    The cache is `$XDG_CACHE_HOME/kvrelay/kernels` (`~/.cache/...`). Several processes may ask at once:
    one builds, the others wait.

    Raises:
        NoCompiler: no C++ compiler, it failed, or the cache folder cannot be written or is not ours alone.
    """
    try:
        compiler = _compiler()
        folder = _cache_folder() / _key(compiler)
        library = folder / "libkvrelay_kernels.so"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_ours(folder)
        if library.is_file():
            return library
        with _lock(folder / "lock"):
            if not library.is_file():
                _compile(compiler, library)
        return library
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompiler(f"building the CPU kernels failed: {error}") from error


def _check_ours(folder: Path) -> None:
    """What lies in there will run in this process: nobody else may have put it there."""
    found = folder.stat()
    if found.st_uid not in {0, os.getuid()} or found.st_mode & stat.S_IWOTH:
        raise NoCompiler(
            f"{folder} belongs to or can be written by others; remove it, or name another cache in "
            "XDG_CACHE_HOME"
        )


def _compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "clang++", "c++"]:
        found = shutil.which(candidate)
        if found:
            return found
    raise NoCompiler(f"no C++ compiler found ({named or 'g++, clang++ or c++'})")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "kvrelay" / "kernels"


def _sources() -> list[Path]:
    return sorted(_SOURCES.glob("*.cpp"))


def _key(compiler: str) -> str:
    """Names everything a build depends on: the sources, the flags, the compiler and the CPU."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.hpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    binary = Path(compiler).resolve().stat()
    digest.update(f"{_FLAGS}{compiler}{binary.st_size}{binary.st_mtime_ns}".encode())
    digest.update(_cpu().encode())
    return digest.hexdigest()


def _cpu() -> str:
    """The instruction sets, where the kernel tells; a cache may travel between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = ("flags", "Features", "model name", "CPU part")
    return platform.machine() + "".join(
        next((line for line in lines if line.startswith(kind)), "") for kind in kinds
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, library: Path) -> None:
    """One compiler a source file, all at once, then the linker."""
    begun = time.monotonic()
    log.info("building the CPU kernels with %s (once on this machine)", compiler)
    target = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    with TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder) / f"{path.stem}.o" for path in _sources()]
        _run_all(
            [compiler, *_FLAGS, target, "-c", str(source), "-o", str(target_file)]
            for source, target_file in zip(_sources(), objects, strict=True)
        )
        linked = Path(folder) / library.name
        _run_all([[compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)]])
        linked.replace(library)
    log.info("built in %.1f s: %s", time.monotonic() - begun, library)


def _run_all(commands: Iterable[list[str]]) -> None:
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    outputs = [process.communicate(timeout=_TIMEOUT_S)[1] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            first = next((line for line in output.splitlines() if "error" in line), output)
            raise NoCompiler(f"building the CPU kernels failed: {first.strip()}")
