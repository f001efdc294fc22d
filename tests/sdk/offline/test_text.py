"""Stop strings, stop tokens, end tokens, and the text that is left."""

import dataclasses

import pytest
from tiny_models import CHAT_TEMPLATE, SPECIALS, clear_case, tiny_model

from kvrelay import SamplingParams
from kvrelay_protocol.errors import InvalidModel, InvalidRequest

MODEL = tiny_model("qwen3")
NEW = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
PROMPT, ANSWER = clear_case(MODEL, 17, NEW)


@pytest.fixture
def answer(llm):
    """Greedy answer to one prompt with some parameters changed."""

    def ask(**changes):
        (output,) = llm.generate(list(PROMPT), dataclasses.replace(GREEDY, **changes))
        return output.outputs[0]

    return ask


def text_of(llm, tokens):
    return llm.get_tokenizer().decode(tokens)


def first_difference(tokens):
    """Index of a token that none before it equals."""
    return next(at for at in range(6, len(tokens)) if tokens[at] not in tokens[:at])


def test_the_text_is_the_decoded_tokens(llm, answer):
    whole = answer()
    assert whole.text == text_of(llm, ANSWER)
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)
    assert answer(detokenize=False).text == ""


def test_a_stop_string_ends_the_answer_and_is_cut_off(llm, answer):
    whole = text_of(llm, ANSWER)
    at = next(i for i in range(8, len(whole) - 2) if whole.find(whole[i : i + 3]) == i)
    stop = whole[at : at + 3]
    stopped = answer(stop=["never there", stop])
    assert stopped.text == whole[:at]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    # The tokens up to the one that completed it are kept, as is everything it decided on.
    assert stopped.token_ids == list(ANSWER[: len(stopped.token_ids)])
    assert stop in text_of(llm, stopped.token_ids)
    assert len(stopped.token_ids) < NEW
    assert answer(stop=stop, include_stop_str_in_output=True).text == whole[: at + 3]


def test_a_stop_string_on_the_last_token_counts_as_a_stop(llm, answer):
    whole = text_of(llm, ANSWER)
    at = next(i for i in range(8, len(whole) - 2) if whole.find(whole[i : i + 3]) == i)
    used = len(answer(stop=whole[at : at + 3]).token_ids)
    last = answer(stop=whole[at : at + 3], max_tokens=used)
    assert (last.finish_reason, len(last.token_ids)) == ("stop", used)


def test_a_stop_string_that_never_comes_leaves_the_text_whole(llm, answer):
    whole = text_of(llm, ANSWER)
    # Held back to the end, since it might have begun: the last character and something after it.
    assert answer(stop=[whole[-1] + "\x00"]).text == whole


def test_text_within_min_tokens_is_not_searched(llm, answer):
    whole = text_of(llm, ANSWER)
    stop = whole[0]
    early, late = answer(stop=stop), answer(stop=stop, min_tokens=6)
    assert len(early.token_ids) == 1
    assert len(late.token_ids) >= 6
    assert late.text.startswith(text_of(llm, ANSWER[:5]))


def test_a_stop_token_ends_the_answer_and_shows_no_text(llm, answer):
    at = first_difference(ANSWER)
    stopped = answer(stop_token_ids=[ANSWER[at]])
    assert stopped.token_ids == list(ANSWER[: at + 1])
    assert stopped.text == text_of(llm, ANSWER[:at])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", ANSWER[at])
    shown = answer(stop_token_ids=[ANSWER[at]], include_stop_str_in_output=True)
    assert shown.text == text_of(llm, ANSWER[: at + 1])


def test_min_tokens_keeps_stop_tokens_from_being_drawn(answer):
    at = first_difference(ANSWER)
    banned = ANSWER[at]
    late = answer(stop_token_ids=[banned], min_tokens=at + 4)
    assert late.token_ids[:at] == list(ANSWER[:at])
    assert banned not in late.token_ids[: at + 3]
    assert len(late.token_ids) >= at + 4


def test_the_models_end_token_ends_an_answer_unless_it_is_ignored(llm):
    end = llm.get_tokenizer().convert_tokens_to_ids("<|im_end|>")
    prompt = list(PROMPT)
    tries = [SamplingParams(temperature=3, max_tokens=60, seed=seed) for seed in range(40)]
    drawn = zip(tries, llm.generate([prompt] * 40, tries), strict=True)
    params, answer = next((p, o.outputs[0]) for p, o in drawn if end in o.outputs[0].token_ids)
    assert answer.token_ids.index(end) == len(answer.token_ids) - 1
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert answer.text == text_of(llm, answer.token_ids[:-1])
    ignored = dataclasses.replace(params, ignore_eos=True)
    going_on = llm.generate(prompt, ignored)[0].outputs[0]
    assert len(going_on.token_ids) == 60
    assert going_on.token_ids[: len(answer.token_ids)] == answer.token_ids
    shown = dataclasses.replace(ignored, skip_special_tokens=False)
    assert "<|im_end|>" in llm.generate(prompt, shown)[0].outputs[0].text
    assert "<|im_end|>" not in going_on.text
    late = dataclasses.replace(params, min_tokens=len(answer.token_ids) + 5)
    assert len(llm.generate(prompt, late)[0].outputs[0].token_ids) >= late.min_tokens


def test_text_prompts_are_tokenised_and_handed_back(llm):
    (one, other) = llm.generate(["the thing", {"prompt": "another"}], GREEDY)
    tokenizer = llm.get_tokenizer()
    assert (one.prompt, other.prompt) == ("the thing", "another")
    assert one.prompt_token_ids == tokenizer.encode("the thing")
    (again,) = llm.generate({"prompt_token_ids": one.prompt_token_ids}, GREEDY)
    assert again.prompt is None
    assert again.outputs[0].text == one.outputs[0].text


def test_chat_renders_the_models_template(llm):
    conversation = [{"role": "user", "content": "hello"}]
    (single,) = llm.chat(conversation, GREEDY)
    assert single.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert single.prompt_token_ids == llm.get_tokenizer().encode(single.prompt)
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
        }
    ]
    several = llm.chat([conversation, parts], GREEDY)
    assert [o.outputs[0] for o in several] == [single.outputs[0]] * 2
    (bare,) = llm.chat(conversation, GREEDY, add_generation_prompt=False)
    assert bare.prompt == "<|im_start|>user\nhello<|im_end|>\n"
    (other,) = llm.chat(conversation, GREEDY, chat_template="{{ messages[0].content }}!")
    assert other.prompt == "hello!"
    with pytest.raises(InvalidModel, match="does not compile"):
        llm.chat(conversation, GREEDY, chat_template="{% if %}")


def test_the_tokenizer_speaks_as_transformers_do(llm):
    from transformers import AutoTokenizer

    ours, theirs = llm.get_tokenizer(), AutoTokenizer.from_pretrained(MODEL)
    text = f"the naïve {SPECIALS[1]} thing 漢字"
    assert ours.encode(text) == theirs.encode(text)
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )
    messages = [{"role": "user", "content": "hello"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages, tokenize=False) == rendered
    assert ours.decode(ours.apply_chat_template(messages), skip_special_tokens=False) == rendered
    assert (
        ours.apply_chat_template(messages, tokenize=False, chat_template=CHAT_TEMPLATE) == rendered
    )
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        [[]],
        [["hello"]],
        [{"content": "hello"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)
def test_messages_that_are_none_are_refused(llm, messages):
    with pytest.raises(InvalidRequest, match="it must be"):
        llm.chat(messages, GREEDY)
