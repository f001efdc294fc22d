"""Who there is to break: the processes of a stack and the streams between them, by name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """How many processes of each kind a stack has."""

    prefill: int = 2
    decode: int = 2
    routers: int = 1

    @property
    def prefill_workers(self) -> tuple[str, ...]:
        return tuple(f"prefill-{number}" for number in range(self.prefill))

    @property
    def decode_workers(self) -> tuple[str, ...]:
        return tuple(f"decode-{number}" for number in range(self.decode))

    @property
    def workers(self) -> tuple[str, ...]:
        return (*self.prefill_workers, *self.decode_workers)

    @property
    def router_names(self) -> tuple[str, ...]:
        return tuple(f"router-{number}" for number in range(self.routers))

    @property
    def links(self) -> tuple[str, ...]:
        """Join streams: every worker joins every router."""
        return tuple(link_name(w, r) for w in self.workers for r in self.router_names)

    def rivals(self, target: str) -> tuple[str, ...]:
        """Workers that may get the work which a worker, or one of its links, waits for."""
        worker = target.partition("/")[0]
        for pool in (self.prefill_workers, self.decode_workers):
            if worker in pool:
                return tuple(name for name in pool if name != worker)
        return ()


def link_name(worker: str, router: str) -> str:
    """The stream between two processes, such as "decode-0/router-0"."""
    return f"{worker}/{router}"
