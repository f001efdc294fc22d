import pytest

from kvrelay_engine.models import dtypes


@pytest.mark.parametrize(
    ("stored", "on_gpu", "native", "expected"),
    [
        ("bfloat16", True, False, "bfloat16"),
        ("float16", True, False, "float16"),
        ("float32", True, False, "float32"),
        ("float64", True, False, "float32"),
        ("bfloat16", False, True, "bfloat16"),
        ("bfloat16", False, False, "float32"),
        ("float16", False, True, "float32"),
        ("float32", False, True, "float32"),
    ],
)
def test_auto_dtype(stored, on_gpu, native, expected, monkeypatch):
    monkeypatch.setattr(dtypes, "cpu_has_bfloat16", lambda: native)
    assert dtypes.resolve_dtype("auto", stored, on_gpu=on_gpu) == expected


def test_a_named_dtype_is_taken_and_an_unknown_one_refused():
    assert dtypes.resolve_dtype("float16", "float32", on_gpu=False) == "float16"
    with pytest.raises(ValueError, match=r"'int4' is none of auto, float32, bfloat16, float16"):
        dtypes.resolve_dtype("int4", "float32", on_gpu=False)


@pytest.mark.parametrize(
    ("flags", "native"),
    [("fpu avx512_bf16 sse", True), ("fpu avx2", False), ("fpu avx512_bf16x", False)],
)
def test_bfloat16_is_native_where_the_flags_say_so(tmp_path, flags, native):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"model name: x\nflags\t\t: {flags}\n")
    assert dtypes.cpu_has_bfloat16(tmp_path) is native
    assert dtypes.cpu_has_bfloat16() in {True, False}
