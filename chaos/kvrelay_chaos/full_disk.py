"""A full disk for one process: what is on it can be read, and nothing can be written."""

import ctypes
import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 1 << 18
_PAGE = 4096
_ROOM = 256 * 1024
"""For what the file system keeps about its files."""


def fill_disk() -> str:
    """Fill the disk under the folders for caches and temporary files, for this process alone.

    Where mounts are allowed, a full tmpfs with the same files takes the place of each folder (ENOSPC).
    Elsewhere this process may not make any file longer (RLIMIT_FSIZE: EFBIG), which is as close as a
    process without rights comes.

    Returns:
        How it was done.
    """
    folders = [Path(tempfile.gettempdir()), cache_folder()]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        _own_mounts()
        for folder in folders:
            _replace_by_full(folder)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EACCES, errno.ENOSYS}:
            raise
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return "no file grows"
    return "no space left"


def cache_folder() -> Path:
    """Where workers keep compiled kernels: `$XDG_CACHE_HOME/kvrelay`, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvrelay" / "kernels"


def _own_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS))
    # What is mounted from here on stays in here.
    _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))


def _replace_by_full(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in files) + _ROOM
    libc = ctypes.CDLL(None, use_errno=True)
    full = Path(tempfile.mkdtemp())
    _check(libc.mount(b"tmpfs", os.fsencode(full), b"tmpfs", 0, f"size={size},mode=700".encode()))
    for path in files:
        copy = full / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    try:
        with (full / "everything else").open("wb", buffering=0) as file:
            while file.write(bytes(_PAGE)):
                pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    _check(libc.mount(os.fsencode(full), os.fsencode(folder), None, _MS_BIND, None))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
