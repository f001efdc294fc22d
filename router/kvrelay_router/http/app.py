"""The ASGI application: routes, the layers around them, and the short way to the two busy ones."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvrelay_protocol.errors import KvrelayError
from kvrelay_router.config import RouterConfig
from kvrelay_router.http import models
from kvrelay_router.http.answer import Answer, Patience
from kvrelay_router.http.auth import RequireKey, tenant_of
from kvrelay_router.http.body import off_loop, parse, read_object
from kvrelay_router.http.caller import CallerWishes, header_values
from kvrelay_router.http.chat import ChatFrames
from kvrelay_router.http.completions import CompletionFrames
from kvrelay_router.http.errors import LastResort, error_response, install_error_handlers
from kvrelay_router.http.generation import Generation
from kvrelay_router.http.hosting import InvocationsEndpoint, ping_status
from kvrelay_router.http.limits import BoundedBody
from kvrelay_router.http.request_id import RequestId
from kvrelay_router.http.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from kvrelay_router.http.validation import (
    GenerationPlan,
    check_model,
    plan_chat,
    plan_completion,
)
from kvrelay_router.requests.types import RequestService
from kvrelay_router.text.served_model import ServedModel

_Planner = Callable[[ServedModel, Mapping[str, Any], CallerWishes], GenerationPlan]
_FramesType = type[ChatFrames] | type[CompletionFrames]


def create_app(
    core: RequestService,
    model: ServedModel,
    config: RouterConfig,
    registry: CollectorRegistry,
    patience: Patience | None = None,
) -> ASGIApp:
    """Build the edge.

    Args:
        core: runs the requests.
        model: what is served.
        config: keys, limits and deadlines.
        registry: what `/metrics` shows.
        patience: time limits towards clients.
    """
    app = FastAPI(title="kvrelay", docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    patience = patience or Patience()
    chat = GeneratingEndpoint(core, model, config, patience, planner=plan_chat, frames=ChatFrames)
    completions = GeneratingEndpoint(
        core, model, config, patience, planner=plan_completion, frames=CompletionFrames
    )
    generating: dict[str, ASGIApp] = {
        "/v1/chat/completions": chat,
        "/v1/completions": completions,
    }
    _add_generating_routes(app, generating)
    _add_plain_routes(app, core, model, registry)
    if config.ping_while_starting is not None:
        generating["/invocations"] = InvocationsEndpoint(chat, completions, model.name)
        _add_hosting_routes(app, generating["/invocations"], core, config.ping_while_starting)
    # Outermost first: whatever an inner layer answers has a request id and never a stack trace.
    bounded = BoundedBody(ShortWay(app, generating), config.max_body_bytes)
    return RequestId(LastResort(RequireKey(bounded, config.api_keys)))


class GeneratingEndpoint:
    """What `POST` does on one of the two generating paths: an ASGI app."""

    def __init__(
        self,
        core: RequestService,
        model: ServedModel,
        config: RouterConfig,
        patience: Patience,
        *,
        planner: _Planner,
        frames: _FramesType,
    ) -> None:
        self._core = core
        self._model = model
        self._config = config
        self._patience = patience
        self._planner = planner
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: KvrelayError, as long as no answer's head is out."""
        headers = header_values(scope)
        await self.answer_to(headers, await read_object(headers, receive), scope, receive, send)

    async def answer_to(
        self,
        headers: Mapping[str, str],
        body: tuple[dict[str, Any], int],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """The same for a body that `read_object` has read."""
        raw, size = body
        limit_s = self._config.request_timeout_s
        wishes = CallerWishes.from_headers(headers, limit_s, tenant_of(scope))
        limited = within_limits(self._model, self._core)
        plan = await off_loop(size, lambda: self._planner(limited, raw, wishes))
        named_events = headers.get("x-stream-protocol") == "1"
        answer = Answer(
            Generation(self._core, plan, notices=named_events),
            self._frames(
                plan.id, int(time.time()), self._model.name, include_usage=plan.include_usage
            ),
            self._patience,
            named_events=named_events,
        )
        await answer(scope, receive, send)


class ShortWay:
    """Takes requests for the busy endpoints past the framework; everything else goes through it.

    The framework's own layers cost more than all that such a request needs of it, which is this: our
    errors become responses.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, ASGIApp]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        try:
            await endpoint(scope, receive, send)
        except KvrelayError as error:
            await error_response(error)(scope, receive, send)


class _Handed(Response):
    """A response that an ASGI app gives."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._endpoint = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


def _add_generating_routes(app: FastAPI, endpoints: Mapping[str, ASGIApp]) -> None:
    """Under the framework as well: for the document of routes, for other methods, for other prefixes."""

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatBody))
    async def chat_completions() -> Response:
        return _Handed(endpoints["/v1/chat/completions"])

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionBody))
    async def completions() -> Response:
        return _Handed(endpoints["/v1/completions"])


def _add_hosting_routes(
    app: FastAPI, invocations: ASGIApp, core: RequestService, while_starting: int
) -> None:
    @app.get("/ping")
    async def ping() -> Response:
        return Response(status_code=ping_status(core.health(), while_starting))

    @app.post("/invocations")
    async def invoke() -> Response:
        return _Handed(invocations)


def within_limits(model: ServedModel, core: RequestService) -> ServedModel:
    """The model as the workers that joined can run it: their pools may hold less than its context."""
    limit = core.context_limit()
    if limit is None or limit >= model.max_model_len:
        return model
    return replace(model, max_model_len=limit)


def _add_plain_routes(
    app: FastAPI,
    core: RequestService,
    model: ServedModel,
    registry: CollectorRegistry,
) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse(
            {"object": "list", "data": [models.model_object(within_limits(model, core))]}
        )

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        check_model(model, model_id)
        return JSONResponse(models.model_object(within_limits(model, core)))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health(request: Request) -> Response:
        state = core.health()
        verbose = "verbose" in request.query_params
        body = models.health_object(state, verbose=verbose)
        return JSONResponse(body, 200 if state.ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    @app.post("/tokenize", openapi_extra=_body_of(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        raw, size = await read_object(request.headers, request.receive)
        limited = within_limits(model, core)

        def work() -> Response:
            return JSONResponse(models.tokenize(limited, parse(TokenizeBody, raw)))

        return await off_loop(size, work)

    @app.post("/detokenize", openapi_extra=_body_of(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        raw, size = await read_object(request.headers, request.receive)

        def work() -> Response:
            return JSONResponse(models.detokenize(model, parse(DetokenizeBody, raw)))

        return await off_loop(size, work)


def _body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """The request body in the OpenAPI document; the routes read it themselves."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"title": schema.__name__, "type": "object"}}
            },
        },
    }
