"""The router process's settings: one frozen value, built once by the command."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Everything `kvrelay router` can be told."""

    model_dir: Path
    """Local folder with at least config.json and tokenizer.json."""
    model_name: str
    """The name clients use; `/v1/models` lists it."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 picks a free one."""
    join_host: str = "127.0.0.1"
    join_port: int = 8001
    """Workers dial this (gRPC); 0 picks a free one."""
    scaler_port: int | None = None
    """KEDA asks here how many workers there shall be; None: nobody does, 0 picks a free one."""
    join_token: str = ""
    """Workers must present it; empty accepts any."""
    join_tls_cert: Path | None = None
    """Certificate chain of the port that workers dial; without one it speaks plain text."""
    join_tls_key: Path | None = None
    join_tls_ca: Path | None = None
    """Workers must present a certificate that descends from one of these."""
    api_keys: tuple[str, ...] = ()
    """Empty: no authentication."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_body_bytes: int = 8 * 1024 * 1024
    max_queue: int = 512
    """Requests that may wait for a place; one more is refused with 429."""
    queue_timeout_s: float = 30.0
    """Longest wait for a place before 503."""
    wake_timeout_s: float = 300.0
    """Longest wait of a request for a pool that was at zero; its own time to run begins after it."""
    request_timeout_s: float = 600.0
    """Deadline of a request that names none."""
    replay_wait_s: float = 2.0
    """After a worker died: longest wait for another one before the stream ends in `WorkerLost`."""
    max_replays: int = 3
    lease_s: float = 10.0
    heartbeat_s: float = 0.25
    drain_grace_s: float = 30.0
    local_prefill_max_tokens: int = 0
    """Prompts with at most this many uncached tokens are prefilled on the decode worker."""
    log_requests: bool = False
    ping_while_starting: int | None = None
    """Status of `GET /ping` until the model can answer, and `POST /invocations` is served; None: neither."""
    supervised: bool = False
    """Another process says where this one answers and that it stops."""
