"""Which worker gives its weights to one that starts, and the ticket that both need for it.

The ticket is drawn here, for one reader and one server, and reaches each over its own authenticated
connection. A key derived from the join secret would say less: behind mutual TLS there may be none, and
whoever knows it could then read from every worker.
"""

import logging
import secrets

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import InvalidRequest
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.worker_link import WorkerLink

OFFER_S = 20.0
"""From the answer to the reader's first request: it has its transport already."""
TICKET_BYTES = 32
MAX_ID_LENGTH = 128
MAX_ADDRESS_BYTES = 4096

logger = logging.getLogger(__name__)


class WeightPeers:
    """Answers `FindWeights`."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry
        self._offers: dict[str, int] = {}
        """How many readers each worker was given, by its name."""

    def find(self, wanted: pb.WeightsWanted) -> pb.WeightsFound:
        """Who has these weights; with an address to send them to, that worker is told.

        Raises:
            Unauthorized, InvalidRequest, LayoutMismatch: who asks could not join.
        """
        self._registry.check_identity(wanted)
        if not 0 < len(wanted.weights_id) <= MAX_ID_LENGTH:
            raise InvalidRequest(
                f"weights_id: needs 1 to {MAX_ID_LENGTH} characters, has {len(wanted.weights_id)}"
            )
        if len(wanted.transport_address) > MAX_ADDRESS_BYTES:
            raise InvalidRequest(
                f"transport_address: {len(wanted.transport_address)} bytes; "
                f"at most {MAX_ADDRESS_BYTES}"
            )
        server = self._choose(wanted)
        if server is None:
            return pb.WeightsFound()
        if not wanted.transport_address:
            return pb.WeightsFound(worker_name=server.name)
        return self._offer(server, wanted)

    def _choose(self, wanted: pb.WeightsWanted) -> WorkerLink | None:
        able = [
            link
            for link in self._registry.links
            if link.weights_id == wanted.weights_id
            and link.transport == wanted.transport
            and link.name != wanted.worker_name
            and not link.draining
            and not link.overflowed
        ]
        names = {link.name for link in self._registry.links}
        self._offers = {name: count for name, count in self._offers.items() if name in names}
        return min(able, key=self._burden, default=None)

    def _burden(self, link: WorkerLink) -> tuple[int, int, str]:
        load = link.load
        return self._offers.get(link.name, 0), load.running + load.waiting, link.name

    def _offer(self, server: WorkerLink, wanted: pb.WeightsWanted) -> pb.WeightsFound:
        ticket, tag = secrets.token_bytes(TICKET_BYTES), secrets.randbits(64)
        self._offers[server.name] = self._offers.get(server.name, 0) + 1
        offer = pb.OfferWeights(
            worker_name=wanted.worker_name,
            weights_id=wanted.weights_id,
            transport_address=wanted.transport_address,
            tag=tag,
            ticket=ticket,
            seconds=OFFER_S,
        )
        self._registry.send(server.name, pb.RouterMessage(offer_weights=offer))
        logger.info("worker %s reads its weights from %s", wanted.worker_name, server.name)
        return pb.WeightsFound(
            worker_name=server.name,
            transport_address=server.transport_address,
            tag=tag,
            ticket=ticket,
            seconds=OFFER_S,
        )
