"""Every kind of fault there is, and what one needs to be carried out."""

from kvrelay_chaos.faults.base import Kind, Surroundings
from kvrelay_chaos.faults.clients import CLIENT_KINDS
from kvrelay_chaos.faults.control import CONTROL_KINDS
from kvrelay_chaos.faults.kv import KV_KINDS
from kvrelay_chaos.faults.processes import PROCESS_KINDS
from kvrelay_chaos.faults.resources import RESOURCE_KINDS

KINDS: tuple[Kind, ...] = (
    *PROCESS_KINDS,
    *CONTROL_KINDS,
    *KV_KINDS,
    *RESOURCE_KINDS,
    *CLIENT_KINDS,
)
BY_NAME = {kind.name: kind for kind in KINDS}

__all__ = ["BY_NAME", "KINDS", "Kind", "Surroundings"]
