"""Which UCX transports kvrelay uses, and what it refuses to inherit from the environment.

Binding facts (measured on libucx 1.21): without peer error handling a peer that is killed in the
middle of a `cma` copy aborts the survivor; with it UCX refuses shared memory ("no peer failure
handler"). So error handling is always on and shared memory is never a candidate: a worker must
outlive its peers, and a killed one must leave no segment in /dev/shm.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from kvrelay_protocol.errors import TransportMisconfigured

# UCX's names for transports through shared memory or another process's memory, aliases included.
_SHARED_MEMORY = frozenset({"sm", "shm", "mm", "posix", "sysv", "cma", "xpmem", "knem"})
_DEVICE_FOLDERS = (Path("/sys/class/net"), Path("/sys/class/infiniband"))


@dataclass(frozen=True, slots=True)
class UcxOptions:
    """Options of `ucx://`, by the names of its query (`ucx://?tls=tcp&chunk_bytes=1048576`)."""

    tls: str = ""
    """UCX_TLS to use. Empty: the environment's, or everything but shared memory."""
    devices: str = ""
    """UCX_NET_DEVICES to use. Empty: the environment's, or all."""
    require: str = ""
    """Comma-separated transport names; `start` fails unless UCX picks one of them ("rc,dc")."""
    chunk_bytes: int = 4 * 1024 * 1024
    """A message is moved in pieces of this size: the unit of cancelling, and the longest time the
    loop is kept (one call into UCX pushes a whole piece; 4 MiB takes about 3 ms on loopback)."""
    window: int = 2
    """Pieces of one message under way at once."""
    max_waiting: int = 1024
    """Messages without a receive that are kept before more are refused."""
    connect_timeout_s: float = 10.0
    cancel_grace_s: float = 2.0
    """How long a cancel waits for the peer before it drops the connection."""
    flush_timeout_s: float = 5.0

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> "UcxOptions":
        """Read a URI query.

        Raises:
            TransportMisconfigured: unknown name, or a value that is not a positive number.
        """
        kinds = {f.name: f.type for f in fields(cls)}
        values: dict[str, str | int | float] = {}
        for name, text in options.items():
            if name not in kinds:
                raise TransportMisconfigured(
                    f"ucx:// has no option {name!r}; known: {', '.join(kinds)}"
                )
            values[name] = _value(name, text, kinds[name])
        return replace(cls(), **values)  # type: ignore[arg-type]


def _value(name: str, text: str, kind: object) -> str | int | float:
    if kind is str:
        return text
    try:
        number = int(text) if kind is int else float(text)
    except ValueError:
        number = 0
    if number <= 0:
        raise TransportMisconfigured(
            f"ucx:// option {name} must be a positive number, not {text!r}"
        )
    return number


def ucx_config(options: UcxOptions, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The UCX settings to create a context with; argument, then environment, then default.

    Raises:
        TransportMisconfigured: see `check_tls` and `check_devices`.
    """
    environ = os.environ if environ is None else environ
    tls_from = "ucx:// option tls" if options.tls else "UCX_TLS"
    devices_from = "ucx:// option devices" if options.devices else "UCX_NET_DEVICES"
    devices = options.devices or environ.get("UCX_NET_DEVICES", "") or "all"
    check_devices(devices_from, devices)
    return {
        "TLS": check_tls(tls_from, options.tls or environ.get("UCX_TLS", "")),
        "NET_DEVICES": devices,
        # Eager messages of several fragments can be left half-received by a killed sender, and
        # such a receive can't be cancelled: anything over one fragment goes by rendezvous.
        "RNDV_THRESH": "8192",
        # A peer that drops the connection while data is under way is otherwise seen after 20 s.
        "KEEPALIVE_INTERVAL": environ.get("UCX_KEEPALIVE_INTERVAL", "1s"),
        # Against the defaults of 8k and 64k: a sixth less processor time per byte on loopback.
        "TCP_TX_SEG_SIZE": environ.get("UCX_TCP_TX_SEG_SIZE", "64k"),
        "TCP_RX_SEG_SIZE": environ.get("UCX_TCP_RX_SEG_SIZE", "128k"),
    }


def carries(lanes: str, names: str) -> bool:
    """Whether one of the transports in `lanes` goes by one of these names.

    Args:
        lanes: what UCX chose, such as "rc_mlx5/mlx5_0:1+tcp/eth0".
        names: comma-separated, UCX's own ("rc_mlx5", "cuda_ipc", "tcp") or of a family ("rc", "dc").
    """
    chosen = [lane.partition("/")[0] for lane in lanes.split("+")]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    return any(have == want or have.startswith(f"{want}_") for have in chosen for want in wanted)


def check_resources(resources: Iterable[str]) -> None:
    """What UCX has opened, such as "tcp/lo", after all: the last word on shared memory.

    Raises:
        TransportMisconfigured: shared memory is among it, whatever let it in.
    """
    shared = {each for each in resources if each.partition("/")[0] in _SHARED_MEMORY}
    if shared:
        raise TransportMisconfigured(
            f"it opened shared memory ({', '.join(sorted(shared))}), which can't survive the death of "
            "a peer (cma aborts this process)"
        )


def check_tls(source: str, value: str) -> str:
    """The transport list to give to UCX for an inherited or configured one.

    Raises:
        TransportMisconfigured: a positive list that names shared memory, or one without a name.
    """
    text = value.strip()
    names = [name.strip() for name in text.removeprefix("^").split(",") if name.strip()]
    if text in ("", "all"):
        return "^sm"
    if not names:
        raise TransportMisconfigured(f"{source}={value!r} names no transport; unset it or use tcp")
    if text.startswith("^"):
        return "^" + ",".join(dict.fromkeys([*names, "sm"]))
    shared = [name for name in names if name.split(":")[0].lstrip("\\") in _SHARED_MEMORY]
    if shared:
        rest = ",".join(name for name in names if name not in shared) or "tcp"
        raise TransportMisconfigured(
            f"{source}={value!r} names shared memory ({', '.join(shared)}), which can't survive the "
            f"death of a peer (cma aborts this process); unset it or use {source}={rest}"
        )
    # Among others it still means every one of them.
    return "^sm" if "all" in names else ",".join(names)


def check_devices(source: str, value: str) -> None:
    """Check that every named network device exists here; UCX itself only drops the unknown ones.

    Raises:
        TransportMisconfigured: names the missing device and those that exist.
    """
    if value == "all":
        return
    present = {
        entry.name for folder in _DEVICE_FOLDERS if folder.is_dir() for entry in folder.iterdir()
    }
    if not present:
        return
    for name in value.removeprefix("^").split(","):
        if name.strip().split(":")[0] not in present:
            raise TransportMisconfigured(
                f"{source}={value!r}: this machine has no network device {name.strip()!r}; it has "
                f"{', '.join(sorted(present))}. Unset it or name one of these"
            )
