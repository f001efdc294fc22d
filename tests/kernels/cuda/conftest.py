"""Runs the tests of this folder on a GPU where there is one, and elsewhere in Triton's interpreter.

The interpreter must be chosen before triton is first imported, which any other test may have done:
without a GPU each module of this folder is therefore one test of the outer session, and runs in a
process of its own. `TRITON_INTERPRET=1 pytest tests/kernels/cuda/...` shows its tests one by one.
"""

import os
import subprocess
import sys

import pytest
import torch

_COMPILED = {"test_compile_gate.py"}
"""Modules that need triton as it is."""


class _Failed(Exception):
    pass


class _InterpretedModule(pytest.File):
    def collect(self):
        run = _InterpretedRun.from_parent(self, name="interpreted")
        run.add_marker(
            pytest.mark.timeout(900)
        )  # all tests of a module, on a machine with other work
        yield run


class _InterpretedRun(pytest.Item):
    def runtest(self):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise _Failed(done.stdout + done.stderr)

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, _Failed):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, None, f"{self.path.stem} in Triton's interpreter"


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name in _COMPILED or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if torch.cuda.is_available():
        return None
    return _InterpretedModule.from_parent(parent, path=module_path)
