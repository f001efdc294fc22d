"""What can be known before any process starts, each answer one clear line and its own exit code."""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from kvrelay.cli.units import format_size
from kvrelay_protocol.errors import (
    DeviceUnavailable,
    InvalidModel,
    NotEnoughMemory,
    PortInUse,
    UnsupportedModel,
    UsageError,
)
from kvrelay_protocol.model_files import ModelFiles, resolve_model
from kvrelay_protocol.weights.header import Header

if TYPE_CHECKING:
    from kvrelay_engine.models.config import ModelConfig

_ROUTER_BYTES = 200 * 1024 * 1024
_WORKER_BYTES = 350 * 1024 * 1024
"""Resident memory of the processes themselves: interpreter and libraries, before any weight."""


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model whose files fit together, as far as reading their headers can tell."""

    files: ModelFiles
    config: "ModelConfig"
    parameters: int


def check_model(reference: str | None, revision: str | None) -> CheckedModel:
    """Resolve and read the model; from a hub, its small files first.

    Raises:
        InvalidModel, UnsupportedModel: the one thing that is wrong with it.
    """
    files = resolve_model(reference, revision=revision, weights=False)
    config = _parse_config(files)
    files.require_tokenizer()
    files = resolve_model(reference, revision=revision)
    headers = files.headers()
    _check_index(files, headers)
    tensors = [tensor for header in headers.values() for tensor in header.values()]
    return CheckedModel(files, config, sum(tensor.elements for tensor in tensors))


def _parse_config(files: ModelFiles) -> "ModelConfig":
    from kvrelay_engine.models.config import parse_model_config

    raw = files.read_config()
    try:
        return parse_model_config(raw)
    except (InvalidModel, UnsupportedModel) as error:
        raise type(error)(f"model {files.directory}: {error.message}") from None
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InvalidModel(
            f"model {files.directory}: config.json does not describe a model: {error}"
        ) from None


def _check_index(files: ModelFiles, headers: Mapping[str, Header]) -> None:
    for index in files.directory.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InvalidModel(f"{index} is not a safetensors index") from None
        missing = sorted(names - headers.keys())
        if missing:
            raise InvalidModel(
                f"{files.reference} lacks {', '.join(missing[:3])}, named in {index.name}"
            )


def check_ports(listeners: Sequence[tuple[str, int, str]]) -> None:
    """Try to bind each (host, port, flag); port 0 stands for any.

    Raises:
        PortInUse: another process listens there.
        UsageError: the address can't be used at all.
    """
    from kvrelay_infra.host import is_port_taken, port_problem

    for host, port, flag in listeners:
        error = port_problem(host, port)
        if error is None:
            continue
        if is_port_taken(error):
            raise PortInUse(f"port {port} on {host} is in use; choose another with {flag}")
        raise UsageError(f"can't listen on {host}:{port} ({flag}): {error.strerror or error}")
    ports = [(port, flag) for _, port, flag in listeners if port]
    if len({port for port, _ in ports}) < len(ports):
        raise UsageError(f"{' and '.join(flag for _, flag in ports)} must differ")


def check_device(device: str, gpus: int) -> None:
    """Refuse a GPU that the driver does not show. `auto` settles with what there is.

    Raises:
        DeviceUnavailable: it does not exist here.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and gpus == 0:
        raise DeviceUnavailable("--device cuda: no NVIDIA GPU here; --device cpu works everywhere")
    if kind == "cuda" and index and int(index) >= gpus:
        raise DeviceUnavailable(f"--device {device}: this machine has {gpus} GPU(s), from cuda:0")


def transport_uri(values: SimpleNamespace) -> str:
    """What a worker's transport is made from."""
    if not values.require_transport:
        return str(values.transport)
    return f"{values.transport}://?require={values.require_transport}"


def check_transport(values: SimpleNamespace) -> None:
    """Refuse an environment that leaves UCX no usable transport, before a worker has loaded a model.

    Where a transport is required, one is started and closed again: a quarter of a second. Without UCX
    there is nothing to refuse.

    Raises:
        TransportMisconfigured: naming the variable; what was required and what UCX chose.
    """
    if values.transport != "ucx":
        return
    from kvrelay_transfer.ucx_env import UcxOptions, ucx_config

    ucx_config(UcxOptions())
    if values.require_transport:
        asyncio.run(_start_and_close(transport_uri(values)))


async def _start_and_close(uri: str) -> None:
    from kvrelay_transfer.transport import create_transport

    transport = create_transport(uri)
    await transport.start()
    await transport.close()


def check_tls(values: SimpleNamespace) -> None:
    """Certificate and key come together.

    Raises:
        UsageError: one of them is missing.
    """
    if (values.tls_cert is None) != (values.tls_key is None):
        missing = "--tls-key" if values.tls_key is None else "--tls-cert"
        raise UsageError(f"{missing} is missing: TLS needs a certificate and its key")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the workers will hold, and how long a sequence may get."""

    weights: int
    """Bytes of one worker's weights."""
    kv_pool: int
    """Bytes of one worker's pool."""
    num_blocks: int
    needed: int
    """All processes together."""
    max_model_len: int
    limited: bool
    """`max_model_len` is what the pool holds, not what the model can."""


def plan_memory(
    model: CheckedModel,
    values: SimpleNamespace,
    *,
    dtype_bytes: int,
    weight_bytes: int,
    available: int,
    on_gpu: bool,
) -> MemoryPlan:
    """Sizes of everything, checked against what there is.

    A context length the user asked for must fit the pool; the model's own is cut to what the pool
    holds.

    Raises:
        NotEnoughMemory: naming need, limit and the flag that helps.
        UsageError: `--max-model-len` beyond what the model can do.
    """
    from kvrelay_engine.cache.sizing import kv_bytes_per_block

    block = kv_bytes_per_block(model.config, values.block_size, dtype_bytes)
    num_blocks = values.kv_memory // block
    longest = model.config.max_position_embeddings
    asked = values.max_model_len
    if asked > longest:
        raise UsageError(f"--max-model-len {asked} exceeds the model's own limit of {longest}")
    holds = num_blocks * values.block_size
    if holds < (asked or min(longest, 2 * values.block_size)):
        tokens = asked or min(longest, 2 * values.block_size)
        need = math.ceil(tokens / values.block_size) * block
        raise NotEnoughMemory(
            f"--kv-memory {format_size(values.kv_memory)} holds {holds} tokens; "
            f"a sequence of {tokens} needs {format_size(need)}"
            + ("; raise it or lower --max-model-len" if asked else "; raise it")
        )
    weights = model.parameters * weight_bytes
    pool = num_blocks * block
    workers = values.prefill + values.decode
    overhead = _WORKER_BYTES + values.staging * values.staging_buffers
    # On a GPU the host holds only the processes; the driver reports device memory itself.
    per_worker = overhead if on_gpu else overhead + weights + pool
    needed = _ROUTER_BYTES + workers * per_worker
    if needed > available:
        spare = (available - _ROUTER_BYTES) // workers - overhead - weights
        fits = spare // block * block
        hint = (
            f"--kv-memory {fits // (1024 * 1024)}MiB fits"
            if not on_gpu and fits >= max(block * 2, 1024 * 1024)
            else "fewer workers or a smaller model would fit"
        )
        raise NotEnoughMemory(
            f"{workers} workers need {format_size(needed)} (weights {format_size(weights)} and "
            f"KV pool {format_size(pool)} each), {format_size(available)} are available; {hint}"
        )
    limit = min(longest, holds)
    return MemoryPlan(
        weights, pool, num_blocks, needed, asked or limit, not asked and holds < longest
    )
