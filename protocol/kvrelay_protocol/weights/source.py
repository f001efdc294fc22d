"""Where weights come from, as the engine sees it."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from kvrelay_protocol.weights.header import StoredTensor
from kvrelay_protocol.weights.kept import KeptFiles

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class WeightSource(Protocol):
    """A checkpoint whose tensors can be read once each, best in the order of `layer_order`."""

    @property
    def origin(self) -> str:
        """Folder or URL, for people."""

    @property
    def files(self) -> Mapping[str, int]:
        """Bytes of each weight file."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor, from the files' headers."""

    @property
    def identity(self) -> str:
        """Name of exactly these bytes; empty where no manifest says what they are."""

    @property
    def kept(self) -> KeptFiles | None:
        """What was also written to disk for others; it outlives the source."""

    def need(self, names: Collection[str]) -> None:
        """Only these are going to be read; called once, before the first `read`."""

    def read(self, name: str) -> memoryview:
        """A tensor's bytes, waiting until they are here; owned by the caller as long as it holds them.

        Raises:
            InvalidModel: they can't be had, or are not what the checkpoint's manifest says.
        """

    def read_range(self, file: str, start: int, size: int) -> bytes:
        """Any bytes of a file.

        Raises:
            InvalidModel: as for `read`.
        """

    def report(self) -> "LoadReport":
        """What the reads so far cost."""

    def close(self) -> None:
        """Stop what is under way; tensors that were read stay valid."""


def layer_order(name: str) -> tuple[int, int]:
    """Sorts tensors as a forward pass meets them: embedding, layers, what follows them."""
    layer = _LAYER.search(name)
    if layer is not None:
        return 1, int(layer[1])
    return (0, 0) if "embed" in name else (2, 0)


SAMPLE_BYTES = 4096


def sample_offsets(total: int, count: int = 64) -> Iterator[int]:
    """Evenly spaced pages of a file of `total` bytes, each `SAMPLE_BYTES` long (the last may be cut)."""
    for index in range(count):
        yield index * max(total - SAMPLE_BYTES, 0) // max(count - 1, 1)


@dataclass(frozen=True, slots=True)
class PeerShare:
    """What another worker had to do with a load."""

    worker: str = ""
    """Its name and, where bytes came, what they came over; empty: there was none."""
    nbytes: int = 0
    found_s: float = 0.0
    """Until it could be read from: asking the router, starting a transport."""
    note: str = ""
    """Why it was none, or not all, in a few words; empty where all came from it."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a start moved, how fast, and against which limit."""

    origin: str
    nbytes: int
    seconds: float
    """From the first request to the last byte; for mapped files, from opening them to the last read."""
    link_bytes_per_s: float | None = None
    """The narrowest link, None where nobody knows it."""
    link_given: bool = False
    """The operator named it; otherwise it is the best moment of this very load."""
    cached_bytes: int | None = None
    """Of local files: how much was in the page cache beforehand. None: not local, or not known."""
    resumed: int = 0
    """Ranges that were taken up again after a broken connection."""
    verified: bool | None = None
    """Every byte was held against a sha256; None: local files, which are not."""
    peer: PeerShare | None = None
    """What came from another worker; None: nobody was to be asked."""

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def link_share(self) -> float | None:
        """Rate over that of the narrowest link."""
        return self.bytes_per_s / self.link_bytes_per_s if self.link_bytes_per_s else None

    def lines(self) -> tuple[str, ...]:
        """For the log of a start."""
        resumed = f", {self.resumed} ranges resumed" if self.resumed else ""
        first = (
            f"{_size(self.nbytes)} in {self.seconds:.2f} s, {self.bytes_per_s / 1e9:.3f} GB/s, "
            f"{self._share()}{resumed}, from {self._places()}"
        )
        if self.verified is False:
            return first, "not verified: no manifest beside them; kvrelay weights push writes one"
        return (first,)

    def _places(self) -> str:
        peer = self.peer
        if peer is None:
            return self.origin
        note = f" ({peer.note})" if peer.note else ""
        if not peer.nbytes:
            return f"{self.origin}{note}"
        found = f"peer {peer.worker} (found in {peer.found_s:.2f} s)"
        if peer.nbytes >= self.nbytes:
            return f"{found}, not {self.origin}{note}"
        left = _size(self.nbytes - peer.nbytes)
        return f"{found} {_size(peer.nbytes)}, from {self.origin} {left}{note}"

    def _share(self) -> str:
        place = self._place()
        if self.link_share is None or self.link_bytes_per_s is None:
            return f"{place}link not known (--link-gbps)"
        rate = f"{self.link_bytes_per_s / 1e9:.3f} GB/s"
        known = f"{rate} as given" if self.link_given else f"best moment of this load, {rate}"
        return f"{place}{self.link_share:.0%} of the narrowest link ({known})"

    def _place(self) -> str:
        if self.cached_bytes is None:
            return ""
        share = self.cached_bytes / self.nbytes if self.nbytes else 1.0
        return f"{share:.0%} of it from the page cache, "

    def attributes(self) -> dict[str, str | int | float | bool]:
        """For the span of a start."""
        found: dict[str, str | int | float | None] = {
            "kvrelay.weights.origin": self.origin,
            "kvrelay.weights.bytes": self.nbytes,
            "kvrelay.weights.seconds": self.seconds,
            "kvrelay.weights.gb_per_s": self.bytes_per_s / 1e9,
            "kvrelay.weights.link_share": self.link_share,
            "kvrelay.weights.link_given": self.link_given,
            "kvrelay.weights.cached_bytes": self.cached_bytes,
            "kvrelay.weights.resumed": self.resumed,
            "kvrelay.weights.verified": self.verified,
            "kvrelay.weights.peer": None if self.peer is None else self.peer.worker or None,
            "kvrelay.weights.peer_bytes": None if self.peer is None else self.peer.nbytes,
            "kvrelay.weights.peer_found_s": None if self.peer is None else self.peer.found_s,
            "kvrelay.weights.peer_note": None if self.peer is None else self.peer.note or None,
        }
        return {name: value for name, value in found.items() if value is not None}


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
