"""A worker process's settings: one frozen value, built once by the command. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from kvrelay_protocol.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Everything `kvrelay prefill` and `kvrelay decode` can be told."""

    name: str
    """Unique among the workers of a router, e.g. `prefill-0`."""
    model_dir: Path
    """Its small files, and the weights where `weights` is None."""
    model_name: str
    router: str
    """host:port of the router's join address; of several routers, separated by commas."""
    weights: WeightSource | None = None
    """Where the weights come from; what is remote has begun to arrive. None: `model_dir`."""
    share_weights: str = "auto"
    """With workers that start later: `auto` if they are still what was fetched, `disk`, or `off`."""
    join_token: str = ""
    router_ca: Path | None = None
    """The routers' certificates descend from one of these; without it the streams are plain text."""
    router_cert: Path | None = None
    """This worker's own certificate chain, for routers that ask for one."""
    router_key: Path | None = None
    router_name: str = ""
    """Name in the routers' certificates, where it is not the host they are dialled at."""
    device: str = "cpu"
    """`cpu` or `cuda` or `cuda:N`; `auto` is resolved by the command before this is built."""
    dtype: str = "auto"
    quantization: str = "none"
    """`int8`: the projections' weights are rounded to 8 bits when they are loaded."""
    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int = 0
    """KV pool size; 0 derives it from `kv_memory_bytes`."""
    kv_memory_bytes: int = 256 * 1024 * 1024
    max_model_len: int = 0
    """Tokens of prompt plus answer; 0 takes the model's own limit."""
    max_batch_tokens: int = 512
    """Prompt tokens computed per step (the chunk of chunked prefill)."""
    max_sequences: int = 256
    """Sequences in one step."""
    transport: str = "ucx"
    threads: int = 0
    """Threads of a step on a CPU; 0 takes as many as torch would."""
    staging_bytes: int = 4 * 1024 * 1024
    """One staging buffer, and with it the largest transfer message."""
    staging_buffers: int = 32
    """Transfers that can be under way at once; their memory is touched as it is used."""
    lease_s: float = 10.0
    heartbeat_s: float = 0.25
    drain_grace_s: float = 30.0

    @property
    def routers(self) -> tuple[str, ...]:
        """Every router's join address, each once."""
        named = (address.strip() for address in self.router.split(","))
        return tuple(dict.fromkeys(address for address in named if address))
