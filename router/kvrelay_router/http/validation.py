"""From a JSON object to `ValidRequest`s: check, render, tokenise."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvrelay_protocol.errors import ContextOverflow, InvalidRequest, ModelNotFound
from kvrelay_protocol.sampling import SamplingParams
from kvrelay_router.http.body import parse
from kvrelay_router.http.caller import CallerWishes
from kvrelay_router.http.parameters import ignored_header, refuse_unsupported
from kvrelay_router.http.schemas import (
    MAX_CHOICES,
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerateBody,
)
from kvrelay_router.requests.types import ValidRequest
from kvrelay_router.text.output import OutputText
from kvrelay_router.text.served_model import ServedModel

# Below this, dividing logits overflows; the answer is the most likely token in any case.
_GREEDY_BELOW = 1e-4


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One answer to make."""

    index: int
    prompt_index: int
    request: ValidRequest
    text: OutputText
    echo: str


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Everything one HTTP request asks for, checked."""

    id: str
    choices: tuple[ChoicePlan, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenised prompt. `text` is what `echo` repeats, empty without it."""

    ids: tuple[int, ...]
    text: str
    context: tuple[int, ...]
    """Tokens the answer's text follows directly; none for chat, where an answer begins a turn."""


def check_model(model: ServedModel, name: str | None) -> None:
    """Refuse another model's name.

    Raises:
        ModelNotFound: this router does not serve it.
    """
    if name is not None and name != model.name:
        raise ModelNotFound(
            f"the model {name[:200]!r} is not served here; this server has {model.name!r}",
            param="model",
        )


def chat_messages(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """Messages as templates know them: `developer` is newer than most and means `system`."""
    return [
        {"role": "system" if m.role == "developer" else m.role, "content": m.content}
        for m in messages
    ]


def render_chat(model: ServedModel, messages: list[ChatMessage], *, add_prompt: bool = True) -> str:
    """The prompt text of a conversation.

    Raises:
        InvalidRequest: the model has no template, or it refuses the messages.
    """
    if model.template is None:
        message = f"{model.name} has no chat template; use /v1/completions"
        raise InvalidRequest(message, param="messages")
    return model.template.render(chat_messages(messages), add_generation_prompt=add_prompt)


def plan_chat(
    model: ServedModel,
    raw: Mapping[str, Any],
    wishes: CallerWishes,
) -> GenerationPlan:
    """Check and tokenise a chat request.

    Raises:
        RequestError: the client can mend it.
    """
    refuse_unsupported(raw)
    body = parse(ChatBody, raw)
    check_model(model, body.model)
    text = render_chat(model, body.messages)
    _check_length(model, body, text, "messages")
    # The template writes the special tokens itself.
    ids = tuple(model.tokenizer.encode(text, add_special_tokens=False))
    prompt = Prompt(ids, "", ())
    choices = _choices(
        model, body, wishes, [prompt], id_prefix="chatcmpl", operation="chat", param="messages"
    )
    return _plan(raw, body, choices)


def plan_completion(
    model: ServedModel,
    raw: Mapping[str, Any],
    wishes: CallerWishes,
) -> GenerationPlan:
    """Check and tokenise a plain completion.

    Raises:
        RequestError: the client can mend it.
    """
    refuse_unsupported(raw)
    body = parse(CompletionBody, raw)
    check_model(model, body.model)
    for given in body.prompt:
        if isinstance(given, str):
            _check_length(model, body, given, "prompt")
    prompts = [_prompt(model, given, echo=body.echo) for given in body.prompt]
    choices = _choices(
        model, body, wishes, prompts, id_prefix="cmpl", operation="text_completion", param="prompt"
    )
    return _plan(raw, body, choices)


def check_token_ids(model: ServedModel, ids: Iterable[int], param: str) -> None:
    """Refuse ids the model has no row for.

    Raises:
        InvalidRequest: naming the first one.
    """
    unknown = next((i for i in ids if i >= model.vocab_size), None)
    if unknown is not None:
        message = f"token id {unknown} is not below the vocabulary's {model.vocab_size}"
        raise InvalidRequest(message, param=param)


def _prompt(model: ServedModel, given: str | tuple[int, ...], *, echo: bool) -> Prompt:
    if isinstance(given, str):
        ids = tuple(model.tokenizer.encode(given, add_special_tokens=True))
        return Prompt(ids, given if echo else "", ids)
    check_token_ids(model, given, "prompt")
    return Prompt(given, model.tokenizer.decode(given) if echo else "", given)


def _plan(
    raw: Mapping[str, Any],
    body: GenerateBody,
    choices: tuple[ChoicePlan, ...],
) -> GenerationPlan:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    return GenerationPlan(
        id=choices[0].request.request_id,
        choices=choices,
        stream=body.stream,
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        headers=ignored_header(raw, type(body).model_fields),
    )


def _choices(
    model: ServedModel,
    body: GenerateBody,
    wishes: CallerWishes,
    prompts: list[Prompt],
    *,
    id_prefix: str,
    operation: str,
    param: str,
) -> tuple[ChoicePlan, ...]:
    """`n` answers to each prompt; each has its own seed, so they differ."""
    if body.n * len(prompts) > MAX_CHOICES:
        raise InvalidRequest(f"n times prompts is at most {MAX_CHOICES}", param="n")
    answer_id = f"{id_prefix}-{secrets.token_hex(12)}"
    seed = secrets.randbits(64) if body.seed is None else body.seed
    stop_ids = frozenset(body.stop_token_ids)
    if not body.ignore_eos:
        stop_ids |= model.eos_token_ids
    choices: list[ChoicePlan] = []
    for prompt_index, prompt in enumerate(prompts):
        max_tokens = _max_tokens(model, body, len(prompt.ids), param)
        for sample in range(body.n):
            index = len(choices)
            request = ValidRequest(
                request_id=answer_id if index == 0 else f"{answer_id}-{index}",
                model=model.name,
                prompt_tokens=prompt.ids,
                sampling=_sampling(model.sampling_defaults, body, seed + sample),
                max_tokens=max_tokens,
                stop_token_ids=stop_ids,
                deadline_s=wishes.deadline_s,
                cache_salt=wishes.tenant + (body.cache_salt or "").encode(),
                traceparent=wishes.traceparent,
                force_path=wishes.force_path,
                wait_s=wishes.wait_s,
                operation=operation,
            )
            text = OutputText(model.tokenizer.detokenizer(prompt.context), body.stop, stop_ids)
            choices.append(ChoicePlan(index, prompt_index, request, text, prompt.text))
    return tuple(choices)


def _max_tokens(model: ServedModel, body: GenerateBody, prompt: int, param: str) -> int:
    """Tokens the answer may have: what was asked for, or all that is left."""
    if prompt == 0:
        raise InvalidRequest("the prompt has no tokens", param=param)
    asked = body.requested_max_tokens()
    left = model.max_model_len - prompt
    if left < (asked or 1):
        raise _overflow(model, asked, prompt, f"{prompt} prompt tokens", param)
    return left if asked is None else asked


def _check_length(model: ServedModel, body: GenerateBody, text: str, param: str) -> None:
    """Refuse a text that is far too long before all of it is tokenised."""
    if model.tokenizer.surely_exceeds(text, model.max_model_len):
        asked = body.requested_max_tokens()
        counted = f"more than {model.max_model_len} prompt tokens"
        raise _overflow(model, asked, model.max_model_len + 1, counted, param)


def _overflow(
    model: ServedModel, asked: int | None, prompt: int, counted: str, param: str
) -> ContextOverflow:
    wanted = "no max_tokens" if asked is None else f"max_tokens={asked}"
    return ContextOverflow(
        f"this model's context length is {model.max_model_len} tokens; the request has "
        f"{counted} and {wanted}, which needs at least {prompt + (asked or 1)}",
        param=param,
    )


def _sampling(defaults: SamplingParams, body: GenerateBody, seed: int) -> SamplingParams:
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_k = defaults.top_k if body.top_k is None else max(body.top_k, 0)
    return SamplingParams(
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=top_k,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        seed=seed % 2**64,
    )
