"""Text to ids: the same whichever call made them, and never at the cost of other threads."""

import pytest

from kvrelay_router.text import tokenizer as module

TEXT = "The quick brown fox jumps. \n" * 20_000


@pytest.mark.parametrize("special", [True, False])
def test_long_texts_have_the_ids_that_short_calls_give(tokenizer, monkeypatch, special):
    text = "Hello there, naïve 中文 text. " * 500
    long = tokenizer.encode(text, add_special_tokens=special)
    monkeypatch.setattr(module, "_SHORT_CHARS", len(text))
    assert tokenizer.encode(text, add_special_tokens=special) == long


def test_a_long_text_never_takes_the_call_that_stops_all_other_threads(tokenizer, monkeypatch):
    backend = tokenizer._backend

    class Watched:
        def __getattr__(self, name):
            return getattr(backend, name)

        def encode(self, text, **options):
            assert len(text) <= 2048
            return backend.encode(text, **options)

    monkeypatch.setattr(tokenizer, "_backend", Watched())
    assert tokenizer.encode("short", add_special_tokens=False)
    assert tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.surely_exceeds(TEXT, 100)


def test_a_text_surely_exceeds_a_limit_only_when_its_tokens_do(tokenizer):
    for text in (TEXT, "a" * 100_000, "é😀" * 30_000, " " * 50_000):
        count = len(tokenizer.encode(text, add_special_tokens=False))
        for limit in (1, 100, count // 8, count // 2, count, count * 2):
            assert not tokenizer.surely_exceeds(text, limit) or count > limit
        assert not tokenizer.surely_exceeds(text, count)
    assert tokenizer.surely_exceeds(TEXT, 100)
