"""`kvrelay router|prefill|decode`: values become a config, the config becomes a running process."""

import os
import socket
from dataclasses import replace
from types import SimpleNamespace

from kvrelay.cli.preflight import (
    check_device,
    check_ports,
    check_tls,
    check_transport,
    transport_uri,
)
from kvrelay.cli.settings import own_thread_setting, set_threads
from kvrelay.cli.weight_source import join_config, open_weights
from kvrelay_infra.host import count_gpus, read_cores
from kvrelay_protocol.errors import DeviceUnavailable, UsageError
from kvrelay_protocol.model_files import resolve_model


def run_router(values: SimpleNamespace) -> int:
    check_tls(values)
    check_ports(
        [
            (values.host, values.port, "--port"),
            (values.join_host, values.join_port, "--join-port"),
        ]
    )
    model = resolve_model(values.model, revision=values.revision, weights=False)
    model.read_config()
    model.require_tokenizer()

    from kvrelay.cli.scaling import read_scaling
    from kvrelay_router.config import RouterConfig
    from kvrelay_router.main import run

    scaling = read_scaling(values)
    return run(
        RouterConfig(
            model_dir=model.directory,
            model_name=values.served_model_name or model.name,
            host=values.host,
            port=values.port,
            join_host=values.join_host,
            join_port=values.join_port,
            scaler_port=values.scaler_port,
            join_token=values.join_token,
            join_tls_cert=values.join_tls_cert,
            join_tls_key=values.join_tls_key,
            join_tls_ca=values.join_tls_ca,
            api_keys=values.api_key,
            tls_cert=values.tls_cert,
            tls_key=values.tls_key,
            max_body_bytes=values.max_body,
            max_queue=values.max_queue,
            queue_timeout_s=values.queue_timeout,
            wake_timeout_s=values.wake_timeout,
            request_timeout_s=values.request_timeout,
            replay_wait_s=values.replay_wait,
            max_replays=values.max_replays,
            lease_s=values.lease,
            heartbeat_s=values.heartbeat,
            drain_grace_s=values.drain_grace,
            local_prefill_max_tokens=values.local_prefill_max_tokens,
            log_requests=values.log_requests,
            ping_while_starting=values.ping_while_starting,
            supervised=values.supervised,
        ),
        scaling,
    )


def run_worker(role: str, values: SimpleNamespace) -> int:
    """`role` is `prefill` or `decode`."""
    model = resolve_model(values.model, revision=values.revision)
    model.read_config()
    # From here on the weights arrive, while torch and UCX are imported.
    name = values.name or f"{role}-{socket.gethostname()}-{os.getpid()}"
    weights = open_weights(role, name, model, values)
    threads = values.threads or own_thread_setting() or 0
    if not threads:
        threads = read_cores()
    # Before torch is imported: OpenMP reads its limit once.
    set_threads(threads)
    check_transport(values)

    config = replace(
        join_config(name, model, values),
        weights=weights,
        share_weights=values.share_weights,
        device=resolve_device(values.device),
        dtype=values.dtype,
        quantization=values.quantization,
        block_size=values.block_size,
        kv_memory_bytes=values.kv_memory,
        max_model_len=values.max_model_len,
        max_batch_tokens=values.max_batch_tokens,
        max_sequences=values.max_sequences,
        transport=transport_uri(values),
        threads=threads,
        staging_bytes=values.staging,
        staging_buffers=values.staging_buffers,
        lease_s=values.lease,
        heartbeat_s=values.heartbeat,
        drain_grace_s=values.drain_grace,
    )
    from kvrelay_engine.runtime.join_tls import join_tls

    join_tls(config)  # its files are read again when the engine is ready; a bad one shows now
    if role == "prefill":
        from kvrelay_prefill.main import run
    elif role == "decode":
        from kvrelay_decode.main import run
    else:
        raise UsageError(f"no such role: {role}")
    return run(config)


def resolve_device(device: str) -> str:
    """`auto` and `auto:N` become what this torch can use; a named GPU must exist.

    Raises:
        DeviceUnavailable: it does not.
    """
    kind, _, index = device.partition(":")
    # Without a driver there is no need to ask torch, whose import is a start-up phase of its own.
    if kind == "cpu" or (kind == "auto" and count_gpus() == 0):
        return "cpu"
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        if gpus == 0:
            return "cpu"
        return f"cuda:{int(index) % gpus}" if index else "cuda"
    check_device(device, gpus)
    if gpus == 0:
        raise DeviceUnavailable(f"--device {device}: torch {torch.__version__} sees no GPU")
    return device
