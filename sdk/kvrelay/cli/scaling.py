"""Who starts a router's workers, and how many: from flags to what the router is given."""

from types import SimpleNamespace
from typing import TYPE_CHECKING

from kvrelay_protocol.errors import UsageError

if TYPE_CHECKING:
    from kvrelay_infra.providers import Provider as PoolProvider
    from kvrelay_router.scaling.config import ScalerConfig
    from kvrelay_router.scaling.loop import Provider, Scaling

_FORMS = "local:SOCKET, kubernetes:NAMESPACE/PREFILL,DECODE or aws:CLUSTER/PREFILL,DECODE"


def read_scaling(values: SimpleNamespace) -> "Scaling | None":
    """How many workers there may be, and who starts them; None where nobody does.

    Raises:
        UsageError: no such provider, two of them, one whose workers can't sleep, or bounds that serve nothing.
        ProviderError: the platform can't be reached from here.
    """
    kind, _, where = (values.provider or "").partition(":")
    if values.sleep and kind != "local":
        raise UsageError(
            f"--sleep {values.sleep:g} needs --provider local:SOCKET: elsewhere whoever runs a worker keeps "
            "its device for it, asleep or not"
        )
    if values.provider is None and values.scaler_port is None:
        return None
    if values.provider is not None and values.scaler_port is not None:
        raise UsageError(
            f"--provider {values.provider} and --scaler-port {values.scaler_port}: one of them "
            "alone may say how many workers run"
        )
    from kvrelay_router.keda.source import AskedTargets
    from kvrelay_router.requests.placement import Role
    from kvrelay_router.scaling.loop import Scaling

    config = _config(values)
    if values.scaler_port is not None:
        return Scaling(config, AskedTargets(), None)
    if kind == "local" and where:
        from kvrelay_infra.scale_socket import SocketProvider

        running = {role: config.pool(role).min for role in Role}
        return Scaling(config, SocketProvider(where), running)
    return Scaling(config, _cluster(values.provider, kind), None)


def _config(values: SimpleNamespace) -> "ScalerConfig":
    from kvrelay_router.scaling.config import PoolConfig, ScalerConfig

    prefill, decode = (
        PoolConfig(
            low,
            high,
            idle_s=values.idle,
            sleep_s=values.sleep,
            # Who lets the last worker go after so long does not hold on to the others for longer.
            stabilisation_s=min(values.idle, PoolConfig().stabilisation_s),
            cooldown_s=min(values.idle, PoolConfig().cooldown_s),
        )
        for low, high in (values.scale_prefill, values.scale_decode)
    )
    try:
        return ScalerConfig(prefill=prefill, decode=decode)
    except ValueError as error:
        raise UsageError(f"--scale-prefill, --scale-decode: {error}") from None


def _cluster(given: str, kind: str) -> "Provider":
    """The provider of two named things in a named place."""
    from kvrelay_infra.providers import open_provider

    if kind not in {"kubernetes", "aws"}:
        raise UsageError(f"--provider {given}: must be {_FORMS}")
    try:
        return _ByName(open_provider(given))
    except ImportError as missing:
        raise UsageError(
            f"--provider {given} needs {missing.name}: pip install 'kvrelay[{kind}]'"
        ) from None


class _ByName:
    """A platform's provider, to the scaler's loop, which knows pools by their names."""

    def __init__(self, provider: "PoolProvider") -> None:
        self._provider = provider

    async def scale(self, pool: str, replicas: int) -> None:
        from kvrelay_infra.providers import Pool

        await self._provider.scale(Pool(pool), replicas)
