"""Where workers run: each provider sets how many of a pool there shall be, and says what became of it."""

from kvrelay_infra.providers.base import Pool, PoolStatus, Provider
from kvrelay_infra.providers.opening import open_provider

__all__ = ["Pool", "PoolStatus", "Provider", "open_provider"]
