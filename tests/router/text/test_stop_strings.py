from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_router.text.output import OutputText
from kvrelay_router.text.stop_strings import StopStrings

small = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def expected(text, stops):
    """The naive answer: the stop that ends first, of those the longest."""
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stops:
                return text[:start], True
    return text, False


def cut(text, sizes):
    while text:
        size = sizes.pop() if sizes else 1
        yield text[:size]
        text = text[size:]


@settings(max_examples=400, deadline=None)
@given(text=small, stops=stops, sizes=st.lists(st.integers(1, 6), max_size=30))
def test_any_cutting_shows_the_text_before_the_first_stop(text, stops, sizes):
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(piece) for piece in cut(text, sizes)) + matcher.flush()
    assert (shown, matcher.found is not None) == expected(text, stops)


@settings(max_examples=400, deadline=None)
@given(text=small, stops=stops)
def test_only_a_possible_beginning_is_held_back(text, stops):
    matcher = StopStrings(stops)
    shown = ""
    for at, char in enumerate(text, 1):
        shown += matcher.push(char)
        if matcher.found:
            return
        held = text[len(shown) : at]
        assert shown + held == text[:at]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_tokens_after_the_stop_do_not_count(byte_level):
    ids = byte_level.encode("one END two three", add_special_tokens=False)
    output = OutputText(byte_level.detokenizer(), ["END"])
    assert output.push(ids) + output.flush() == "one "
    assert output.stopped()
    assert byte_level.decode(ids[: output.tokens]).endswith("END")


def test_hidden_tokens_count_but_show_nothing(byte_level):
    ids = byte_level.encode("one", add_special_tokens=False)
    end = byte_level.token_id("a")
    output = OutputText(byte_level.detokenizer(), (), {end})
    assert output.push([*ids, end]) + output.flush() == "one"
    assert output.tokens == len(ids) + 1


def test_a_stop_string_completed_by_the_flush_stops(byte_level):
    ids = byte_level.encode("x𐍈", add_special_tokens=False)[:-1]
    output = OutputText(byte_level.detokenizer(), ["\ufffd"])
    assert output.push(ids) + output.flush() == "x"
    assert output.stopped()
