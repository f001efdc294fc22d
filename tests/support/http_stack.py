"""`local_stack` with its HTTP edge on a real socket: what a client of the API sees, in one process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from local_stack import local_stack
from prometheus_client import CollectorRegistry
from tiny_models import tiny_model

from kvrelay_router.config import RouterConfig
from kvrelay_router.http.app import create_app
from kvrelay_router.http.server import create_server, listen
from kvrelay_router.text.served_model import load_served_model

MODEL = "tiny"


@contextlib.asynccontextmanager
async def http_stack(folder: Path | None = None, **options: Any) -> AsyncIterator[str]:
    """The base URL of a stack that serves a tiny Llama as `MODEL`; options are `local_stack`'s."""
    folder = folder or tiny_model("llama3")
    async with local_stack(folder, **options) as stack:
        model = load_served_model(folder, MODEL)
        app = create_app(stack.core.service, model, stack.core.config, CollectorRegistry())
        listener = listen("127.0.0.1", 0)
        server = create_server(app, RouterConfig(model_dir=folder, model_name=MODEL, port=0))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
