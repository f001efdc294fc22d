"""`GET /ping` and `POST /invocations`: what platforms of one container ask for, on the handlers of OpenAI's routes.

SageMaker: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
RunPod: https://docs.runpod.io/serverless/load-balancing/overview
"""

from collections.abc import Mapping
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from kvrelay_protocol.errors import InvalidRequest
from kvrelay_router.http.body import read_object
from kvrelay_router.http.caller import header_values
from kvrelay_router.requests.types import Health


class ReadEndpoint(Protocol):
    """An endpoint that can be handed a body which has been read already."""

    async def answer_to(
        self,
        headers: Mapping[str, str],
        body: tuple[dict[str, Any], int],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None: ...


class InvocationsEndpoint:
    """Chat or completion, by what the body has; `model` may be left out, for there is one."""

    def __init__(self, chat: ReadEndpoint, completions: ReadEndpoint, model_name: str) -> None:
        self._chat = chat
        self._completions = completions
        self._model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: KvrelayError, as long as no answer's head is out."""
        headers = header_values(scope)
        raw, size = await read_object(headers, receive)
        endpoint = self._chat if is_chat(raw) else self._completions
        if raw.get("model") is None:
            raw["model"] = self._model_name
        await endpoint.answer_to(headers, (raw, size), scope, receive, send)


def is_chat(raw: Mapping[str, Any]) -> bool:
    """Whether a body is a chat, and not a plain completion.

    Raises:
        InvalidRequest: it has both `messages` and `prompt`, or neither.
    """
    chat, completion = (raw.get(name) is not None for name in ("messages", "prompt"))
    if chat == completion:
        found = "both" if chat else "neither"
        raise InvalidRequest(
            f"the body has {found} of messages and prompt; give messages for a chat, "
            "prompt for a completion",
            param="messages",
        )
    return chat


def ping_status(health: Health, while_starting: int) -> int:
    """200 when a request can be answered, 503 while draining, else what means "not yet" here."""
    if health.ready:
        return 200
    return 503 if health.phase == "draining" else while_starting
