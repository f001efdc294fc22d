"""Weights from a worker that has them already, and from the store what that one does not give.

    search ──► a peer ──► every range: as much of it as the peer gives, the rest from the store
        └────► nobody ──► the store

A peer is believed only against a manifest: what it sends is verified piece by piece like what the store
sends, and a wrong piece is fetched again from there.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvrelay_protocol.errors import KvrelayError
from kvrelay_protocol.weights.manifest import Manifest
from kvrelay_protocol.weights.source import PeerShare
from kvrelay_protocol.weights.stream import RangeFetcher, Received


class PeerRanges(Protocol):
    """Another worker's weights; called by many threads at once."""

    @property
    def worker(self) -> str:
        """Its name, and what bytes come over."""

    @property
    def gone(self) -> str:
        """Why nothing more comes from it; empty while it is there."""

    def fetch(self, file: str, start: int, into: memoryview, received: Received) -> int:
        """Fill `into` from its beginning; returns how many bytes of it are right.

        Fewer than all: it went away, is too slow, or does not have them. Nothing else writes to
        `into` afterwards. What `received` raises is passed on.
        """

    def give_up(self, why: str) -> None:
        """Ask it for nothing more; what is under way ends."""

    def close(self) -> None:
        """Free everything. Idempotent."""


FindPeer = Callable[[str], PeerRanges | None]
"""Asks for a worker that has the weights of this identity; may take seconds. None: there is none."""


class PeerFirst(RangeFetcher):
    """The peer's bytes where it has them, else the store's."""

    def __init__(self, store: RangeFetcher, find_peer: FindPeer, manifest: Manifest | None) -> None:
        """Begins to search; ranges wait for the outcome.

        Args:
            store: has everything.
            find_peer: called once, on a thread of its own.
            manifest: of the weights; None: nothing is taken from a peer.
        """
        self._store = store
        self._found: PeerRanges | None = None
        self._handed_over = 0
        self._given: dict[tuple[str, int], int] = {}
        """Bytes that the peer gave of each range, by file and start."""
        self._found_s = 0.0
        self._closed = False
        self._note = "" if manifest else "without a manifest nothing is taken from another worker"
        self._lock = threading.Lock()
        self._searched = threading.Event()
        if manifest is None:
            self._searched.set()
            return
        search = threading.Thread(
            target=self._search, args=(find_peer, manifest.identity()), daemon=True
        )
        search.start()

    def _search(self, find_peer: FindPeer, identity: str) -> None:
        begun = time.monotonic()
        try:
            self._found = find_peer(identity)
            with self._lock:
                late = self._closed
            if self._found is None:
                self._note = "no other worker is known to have them"
            elif late:
                self._found.close()
        except KvrelayError as error:
            self._note = str(error)
        finally:
            self._found_s = time.monotonic() - begun
            self._searched.set()

    def peer_share(self) -> PeerShare:
        found = self._found
        if found is None:
            return PeerShare(note=self._note)
        with self._lock:
            nbytes = sum(self._given.values())
        return PeerShare(found.worker, nbytes, self._found_s, found.gone)

    def fetch(self, file: str, start: int, into: memoryview, received: Received) -> None:
        self._searched.wait()
        peer, done = self._found, 0
        if peer is not None and not peer.gone:
            done = peer.fetch(file, start, into, received)
            with self._lock:
                self._given[file, start] = done
                self._handed_over += 0 < done < len(into)
        if done < len(into):
            self._store.fetch(file, start + done, into[done:], received)
        with self._lock:
            self.resumed = self._store.resumed + self._handed_over

    def distrust(self, file: str, start: int) -> bool:
        """Whether any of it was the peer's, from whom nothing more is taken then."""
        with self._lock:
            given = self._given.pop((file, start), 0)
        if not given or self._found is None:
            return False
        self._found.give_up("it sent a wrong checksum")
        return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._store.close()
        if self._found is not None:
            self._found.close()
