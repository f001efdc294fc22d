"""Asks the routers which worker has the weights that this one needs. Imports no torch."""

import logging

import grpc

from kvrelay_engine.runtime.join import JoinTls
from kvrelay_engine.runtime.start_report import dial
from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol import fleet_pb2_grpc as rpc
from kvrelay_protocol.errors import WireError, error_from_wire
from kvrelay_protocol.versions import JOIN_VERSION

ASK_S = 2.0
"""A router that is up answers in milliseconds; one that is not must not hold a start back."""

log = logging.getLogger(__name__)


class WeightSearch:
    """One worker's question, to be asked of every router in turn."""

    def __init__(
        self,
        routers: tuple[str, ...],
        tls: JoinTls | None,
        *,
        name: str,
        role: pb.Role,
        model: str,
        join_token: str,
        transport: str,
    ) -> None:
        """Args: as in this worker's hello; `transport` is a URI scheme."""
        self._routers = routers
        self._tls = tls
        self._question = pb.WeightsWanted(
            protocol_version=JOIN_VERSION,
            worker_name=name,
            role=role,
            model=model,
            join_token=join_token,
            transport=transport,
        )

    def ask(self, weights_id: str, address: bytes = b"") -> pb.WeightsFound | None:
        """Who has these weights; None: nobody that a router knows.

        Args:
            weights_id: see `WeightSource.identity`.
            address: where they are to be sent; then the answer has a ticket, and that worker its twin.

        Raises:
            KvrelayError: a router does not take this worker for one of its own.
        """
        question = pb.WeightsWanted(weights_id=weights_id, transport_address=address)
        question.MergeFrom(self._question)
        for router in self._routers:
            try:
                with dial(router, self._tls) as channel:
                    found: pb.WeightsFound = rpc.FleetStub(channel).FindWeights(
                        question, timeout=ASK_S
                    )
            except grpc.RpcError as error:
                # It restarts, or is older than this question.
                log.info("%s does not say who has the weights: %s", router, error)
                continue
            if found.HasField("error"):
                raise error_from_wire(WireError(found.error.code, found.error.message))
            if found.worker_name:
                return found
        return None
