"""The compiled kernels, where there is a compiler."""

import pytest

from kvrelay_kernels.cpu.library import cpu_library


@pytest.fixture
def library():
    """The compiled kernels, on one thread before and after the test."""
    found = cpu_library()
    if found is None:
        pytest.skip("no C++ compiler")
    found.set_threads(1)
    yield found
    found.set_threads(1)
