import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

REPLACEMENT = "\ufffd"
relaxed = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def pieces(tokenizer, ids, size, context=()):
    detokenizer = tokenizer.detokenizer(context)
    out = [detokenizer.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    return [*out, detokenizer.flush()]


@relaxed
@given(text=texts, size=st.integers(1, 4))
def test_pieces_of_encoded_text_join_to_the_text_and_never_show_half_a_character(
    tokenizer, text, size
):
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = pieces(tokenizer, ids, size)
    assert "".join(shown) == tokenizer.decode(ids)
    if REPLACEMENT not in tokenizer.decode(ids):
        assert not any(REPLACEMENT in piece for piece in shown)


@relaxed
@given(data=st.data(), size=st.integers(1, 4))
def test_pieces_of_any_ids_join_to_the_whole_decode(tokenizer, data, size):
    # Also special tokens, bytes that are no character, and ids beyond the vocabulary.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=60))
    assert "".join(pieces(tokenizer, ids, size)) == tokenizer.decode(ids)


@relaxed
@given(before=st.text("the qu.", min_size=1), after=st.text("the qu.", min_size=1))
def test_after_a_context_only_the_new_text_is_shown(byte_fallback, before, after):
    context = byte_fallback.encode(before, add_special_tokens=False)
    ids = byte_fallback.encode(after, add_special_tokens=False)
    assert "".join(pieces(byte_fallback, ids, 1, context)) == " " + after


def test_a_context_may_end_in_bytes(byte_fallback):
    context = byte_fallback.encode("a𐍈", add_special_tokens=False)
    more = byte_fallback.encode("b", add_special_tokens=False)
    assert "".join(pieces(byte_fallback, more, 1, context)) == " b"
    another = context[-4:]  # the character's bytes again, then a lone one
    assert "".join(pieces(byte_fallback, another, 1, context)) == "𐍈"
    assert "".join(pieces(byte_fallback, another[:1], 1, context)) == REPLACEMENT


def test_a_context_that_ends_inside_a_character_is_left_out(byte_fallback):
    context = byte_fallback.encode("a𐍈", add_special_tokens=False)[:-1]
    assert "".join(pieces(byte_fallback, context[-1:], 1, context)) == REPLACEMENT


def test_a_word_after_a_context_keeps_its_space(byte_fallback):
    context = byte_fallback.encode("the quick", add_special_tokens=False)
    ids = byte_fallback.encode("brown", add_special_tokens=False)
    assert "".join(pieces(byte_fallback, ids, 1, context)) == " brown"
    assert "".join(pieces(byte_fallback, ids, 1)) == "brown"


def test_a_word_after_a_skipped_token_keeps_its_space(byte_fallback):
    special = byte_fallback.token_id("<|im_end|>")
    word = byte_fallback.encode("fox", add_special_tokens=False)
    ids = [*word, special, special, *word]
    assert "".join(pieces(byte_fallback, ids, 1)) == "fox fox"


def test_a_character_appears_with_its_last_byte(byte_level):
    ids = byte_level.encode("𐍈", add_special_tokens=False)
    assert len(ids) == 4
    assert pieces(byte_level, ids, 1) == ["", "", "", "𐍈", ""]


def test_a_cut_character_is_flushed_as_a_replacement(tokenizer):
    ids = tokenizer.encode("a𐍈", add_special_tokens=False)[:-1]
    shown = pieces(tokenizer, ids, 1)
    assert "".join(shown) == tokenizer.decode(ids)
    assert REPLACEMENT not in "".join(shown[:-1])
    assert REPLACEMENT in shown[-1]


@pytest.mark.parametrize("content", ["<tool_call>", "<｜end｜>", "é", "a b"])
def test_added_tokens_decode_as_written(content):
    from scripted_service import byte_level_backend

    from kvrelay_router.text.tokenizer import Tokenizer

    backend = byte_level_backend()
    backend.add_tokens([content])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(f"x{content}y", add_special_tokens=False)
    assert backend.token_to_id(content) in ids
    assert "".join(pieces(tokenizer, ids, 1)) == tokenizer.decode(ids)
