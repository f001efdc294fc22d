"""The storage format that a name stands for."""

import pytest

from kvrelay_engine.models import dtypes


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float32"),
        ("float64", "float32"),
    ],
)
def test_auto_is_the_checkpoints_own_dtype(stored, expected):
    assert dtypes.resolve_dtype("auto", stored) == expected


def test_a_named_dtype_is_taken_and_an_unknown_one_refused():
    assert dtypes.resolve_dtype("float16", "float32") == "float16"
    with pytest.raises(ValueError, match=r"'int4' is none of auto, float32, bfloat16, float16"):
        dtypes.resolve_dtype("int4", "float32")
