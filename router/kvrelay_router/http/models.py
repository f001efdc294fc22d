"""`GET /v1/models`, `/health`, `/tokenize`, `/detokenize`: what they answer."""

from dataclasses import asdict
from typing import Any

from kvrelay_protocol.errors import InvalidRequest
from kvrelay_router.http.schemas import DetokenizeBody, TokenizeBody
from kvrelay_router.http.validation import check_model, check_token_ids, render_chat
from kvrelay_router.requests.types import Health
from kvrelay_router.text.served_model import ServedModel


def model_object(model: ServedModel) -> dict[str, Any]:
    """One entry of the model list; `max_model_len` is what clients read as the context window."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "kvrelay",
        "max_model_len": model.max_model_len,
    }


def health_object(health: Health, *, verbose: bool) -> dict[str, Any]:
    """Readiness in one word; the workers only where asked for."""
    body: dict[str, Any] = {
        "status": "ok" if health.ready else "unavailable",
        "phase": health.phase,
    }
    if verbose:
        body["workers"] = [asdict(worker) for worker in health.workers]
        body["starting"] = list(health.starting)
    return body


def tokenize(model: ServedModel, body: TokenizeBody) -> dict[str, Any]:
    """Ids of a prompt, or of a conversation after the template.

    Raises:
        InvalidRequest: neither or both are given.
    """
    check_model(model, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.messages is not None:
        text = render_chat(model, body.messages, add_prompt=body.add_generation_prompt)
        special = False if body.add_special_tokens is None else body.add_special_tokens
    else:
        text = body.prompt or ""
        special = True if body.add_special_tokens is None else body.add_special_tokens
    ids = model.tokenizer.encode(text, add_special_tokens=special)
    return {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids}


def detokenize(model: ServedModel, body: DetokenizeBody) -> dict[str, Any]:
    """Text of ids, special tokens left out.

    Raises:
        InvalidRequest: an id is no token of this model.
    """
    check_model(model, body.model)
    check_token_ids(model, body.tokens, "tokens")
    return {"prompt": model.tokenizer.decode(body.tokens)}
