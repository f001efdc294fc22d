import json

import pytest
from scripted_service import byte_level_backend, write_model_folder

from kvrelay_protocol.errors import InvalidModel, InvalidRequest
from kvrelay_router.text.chat_template import ChatTemplate
from kvrelay_router.text.served_model import load_served_model

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA2 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' }}
        {%- if loop.first and system_message %}{{- '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' }}{%- endif %}
        {{- message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- generation %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

HELPERS = """
  {% for message in messages %}
    {% if message.role == 'system' %}
      {% continue %}
    {% endif %}
    {{ message | tojson }} {{ {'b': '<&>é', 'a': [1, none, true]} | tojson(sort_keys=true, separators=(',', ':')) }}
    {% if loop.index >= 3 %}{% break %}{% endif %}
  {% endfor %}
{{ pad_token }}{{ unk_token }}|{{ strftime_now('%Y') }}|{{ documents is none }}{{ nothing is defined }}
"""

CONVERSATIONS = [
    [{"role": "user", "content": "Hello <b>&</b> \"quoted\" 'text'"}],
    [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "Grüße 🙂\n\n"},
        {"role": "assistant", "content": "<think>x</think>\n\nHi "},
        {"role": "user", "content": " {{ not_a_template }} {% raw %}"},
    ],
    [{"role": "user", "content": ""}],
]


@pytest.fixture(scope="module")
def reference():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), **TOKENS)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "source",
    [CHATML, LLAMA2, LLAMA3, QWEN3, HELPERS],
    ids=["chatml", "llama2", "llama3", "qwen3", "helpers"],
)
def test_rendering_equals_transformers(reference, source, conversation, add_generation_prompt):
    expected = reference.apply_chat_template(
        conversation,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    template = ChatTemplate(source, TOKENS)
    assert template.render(conversation, add_generation_prompt=add_generation_prompt) == expected


def test_a_refusal_of_the_template_is_the_clients_error():
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        ChatTemplate(LLAMA2, TOKENS).render([{"role": "assistant", "content": "x"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ undefined_function() }}",
    ],
)
def test_a_breaking_template_is_a_typed_error_without_prompt_text(source):
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "SECRET"}])
    assert "SECRET" not in str(caught.value)


def test_a_slow_render_is_cut_off():
    source = "{% for a in messages[0].content %}{% for b in messages[0].content %}{{ a.x }}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="longer than"):
        ChatTemplate(source, max_seconds=0.1).render([{"role": "user", "content": "x" * 10**5}])


def test_a_large_render_is_cut_off():
    source = "{% for a in range(1000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(InvalidRequest, match="more than 5000"):
        ChatTemplate(source, max_chars=5000).render([{"role": "user", "content": "x" * 1000}])


def test_a_template_that_does_not_compile_is_an_invalid_model():
    with pytest.raises(InvalidModel, match="line 1"):
        ChatTemplate("{% for %}")


def test_a_model_folder_is_read(tmp_path):
    model = load_served_model(write_model_folder(tmp_path), "tiny")
    assert model.eos_token_ids == {0, 2}
    assert model.max_model_len == 512
    assert (model.sampling_defaults.temperature, model.sampling_defaults.top_k) == (0.7, 20)
    (tmp_path / "chat_template.jinja").write_text("from file {{ eos_token }}")
    model = load_served_model(tmp_path, "tiny")
    assert model.template is not None
    assert model.template.render([]) == "from file <|im_end|>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "can't be read as a tokenizer"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", "{}", "no context length"),
        ("generation_config.json", "{", "not valid JSON"),
    ],
)
def test_a_broken_folder_is_an_invalid_model(tmp_path, name, content, message):
    write_model_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidModel, match=message):
        load_served_model(tmp_path, "tiny")


def test_odd_defaults_are_left_out(tmp_path):
    write_model_folder(tmp_path)
    odd = {"temperature": "hot", "top_p": 7, "top_k": True, "min_p": -1, "eos_token_id": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(odd))
    defaults = load_served_model(tmp_path, "tiny").sampling_defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (
        1.0,
        1.0,
        0,
        0.0,
    )
