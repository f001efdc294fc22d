"""The other end of `peer_server`: starts it, and offers its weights as a router would."""

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Self

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.errors import WorkerStartFailed
from kvrelay_transfer.weights.client import PeerReader

NAME = "peer"
_STOP_S = 60.0


class PeerServer:
    """A running `peer_server`; as a context manager it is stopped at the end."""

    def __init__(self, path: Path, identity: str) -> None:
        """Args:
        path: a weight file.
        identity: what the server calls it.

        Raises:
            WorkerStartFailed: the process ended at once.
        """
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvrelay_bench.weights.peer_server", str(path), identity],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._address = self._line()
        self._identity = identity

    def offer(
        self, reader: PeerReader, *, identity: str | None = None, ticket: bytes | None = None
    ) -> None:
        """Let somebody read.

        Args:
            reader: who.
            identity: of the offer, if not the server's.
            ticket: that the server is told, if not the reader's.
        """
        found = pb.WeightsFound(
            worker_name=NAME,
            transport_address=bytes.fromhex(self._address),
            tag=secrets.randbits(64),
            ticket=secrets.token_bytes(32),
            seconds=60.0,
        )
        offer = pb.OfferWeights(
            worker_name="reader",
            weights_id=identity or self._identity,
            transport_address=reader.address,
            tag=found.tag,
            ticket=ticket or found.ticket,
            seconds=found.seconds,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(offer.SerializeToString().hex() + "\n")
        self.process.stdin.flush()
        self._line()
        reader.read_from(found, self._identity)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise WorkerStartFailed("the process that serves weights ended")
        return line

    def stop(self) -> None:
        """Let it end by itself."""
        self.process.communicate(timeout=_STOP_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()
