"""A process with a full disk, by whichever way the machine allows."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import errno, pathlib, sys, tempfile
from kvrelay_chaos.full_disk import cache_folder, fill_disk

{before}
print(fill_disk())
print((cache_folder() / "kept").read_text())
for folder in (cache_folder(), pathlib.Path(tempfile.gettempdir())):
    try:
        (folder / "new").write_bytes(bytes(100))
    except OSError as error:
        assert error.errno in (errno.ENOSPC, errno.EFBIG), error
        print("full")
"""

WITHOUT_MOUNTS = """
import kvrelay_chaos.full_disk as full

def refused():
    raise PermissionError(errno.EPERM, "no")

full._own_mounts = refused
"""


@pytest.mark.parametrize("before", ["", WITHOUT_MOUNTS])
def test_what_is_there_can_be_read_and_nothing_written(tmp_path, before):
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    (cache / "kvrelay" / "kernels").mkdir(parents=True)
    temporary.mkdir()
    (cache / "kvrelay" / "kernels" / "kept").write_text("still here")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=True,
    )
    how, kept, *full = done.stdout.splitlines()
    assert how in {"no space left", "no file grows"}
    assert kept == "still here"
    assert full == ["full", "full"]
    # Only for that process.
    (cache / "kvrelay" / "kernels" / "new").write_bytes(bytes(100))
    (temporary / "new").write_bytes(bytes(100))
