"""One engine for most tests; each leaves every block behind, free or cached."""

from collections.abc import Iterator

import pytest
from tiny_models import tiny_model

from kvrelay import LLM

FAMILY = "qwen3"


def make_llm(**options):
    settings = {"dtype": "float32", "num_gpu_blocks_override": 256, "device": "cpu", "threads": 1}
    return LLM(tiny_model(FAMILY), **{**settings, **options})


def check_idle(llm):
    scheduler = llm._engine.scheduler
    scheduler.check_integrity()
    counts = scheduler.allocator.counts
    assert counts.free + counts.cached == counts.total
    assert not llm._engine._open and not llm._engine._queue


@pytest.fixture(scope="module")
def shared_llm() -> Iterator[LLM]:
    with make_llm() as made:
        yield made


@pytest.fixture
def llm(shared_llm) -> Iterator[LLM]:
    yield shared_llm
    check_idle(shared_llm)
    shared_llm.reset_prefix_cache()


@pytest.fixture
def build():
    """Makes engines with settings of their own."""
    made = []

    def make(**options):
        made.append(make_llm(**options))
        return made[-1]

    yield make
    for each in made:
        check_idle(each)
        each.shutdown()
