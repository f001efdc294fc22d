"""Every order of events between one router and real workers: nobody decodes on KV that is not its own, no
block is lost or held twice, every request ends once.

`tests/support/simulated/` has the world: real router service, request machines, workers, schedulers,
allocators, senders, receivers, frames and pools; simulated are the clock, the network, the model (its KV names
the prompt it was computed from) and the threads. A failure shrinks to the shortest list of events.

`KVRELAY_EXAMPLES=20` runs twenty times as many examples.
"""

import os
import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulated.fabric import Flight
from simulated.world import World, forged

EXAMPLES = int(os.environ.get("KVRELAY_EXAMPLES", "1"))
STEPS = 40


def some_order(moves: int, seed: int) -> list[int]:
    """Which of the possible moves to make, so many times."""
    rng = random.Random(seed)
    return [rng.randrange(2000) for _ in range(moves)]


seeds = st.integers(0, 2**16)
tokens = st.lists(st.integers(3, 5), min_size=1, max_size=12).map(tuple)
choices = st.builds(some_order, st.integers(0, 60), seeds)
until = st.builds(some_order, st.just(80), seeds)
index = st.integers(0, 50)
salts = st.sampled_from([b"", b"", b"t"])
flips = st.none() | st.integers(0, 8 * 700)
requests = st.lists(st.tuples(tokens, st.integers(1, 4), salts), min_size=1, max_size=3)
ON_THE_WAY = ("corrupt", "corrupt", "spare", "truncate", "lose", "forge")
plans = st.lists(
    st.tuples(st.sampled_from(ON_THE_WAY), st.integers(0, 8 * 700)), min_size=1, max_size=4
)
REPLAYS = ("late", "again", "again", "foreign", "renamed")
AT_THE_ENDS = ("die", "cut", "sleep")


class Ownership(RuleBasedStateMachine):
    @initialize(
        prefill=st.sampled_from(["P", "PQ"]),
        decode=st.sampled_from(["D", "D", "DE"]),
        decode_block=st.sampled_from([2, 2, 4]),
    )
    def start(self, prefill: str, decode: str, decode_block: int) -> None:
        self.world = World(prefill, decode, decode_block)
        self.faults = 0

    # ---- what happens anyway

    @precondition(lambda self: sum(not c.ended for c in self.world.clients) < 4)
    @rule(asked=requests, go=choices)
    def submit(self, asked, go) -> None:
        for prompt, max_tokens, salt in asked:
            self.world.submit(prompt, max_tokens, salt)
        self.world.go(go)

    @rule(go=choices)
    def go(self, go: list[int]) -> None:
        self.world.go(go)

    @rule(seconds=st.sampled_from([0.01, 0.3, 0.3, 1.1, 2.5]), wake=st.booleans())
    def time_passes(self, seconds: float, wake: bool) -> None:
        if wake:
            self.world.wake()
        self.world.wait(seconds)

    # ---- what goes wrong on the way

    @rule(plan=plans, go=until)
    def disturb(self, plan: list[tuple[str, int]], go: list[int]) -> None:
        """Something happens to the next messages that are sent."""
        world = self.world
        spared: list[Flight] = []
        for kind, bit in plan:
            world.go(go, lambda: [f for f in world.flights() if f not in spared])
            fresh = [flight for flight in world.flights() if flight not in spared]
            if not fresh:
                return
            flight = fresh[0]
            spared.append(flight)
            match kind:
                case "corrupt":
                    flight.flips.append(bit)
                case "truncate":
                    flight.cut = bit // 8
                case "lose":
                    world.lose_message(flight)
                case "forge":  # and be faster
                    fake = forged(flight.snapshot)
                    world.hurry(world.fabric.inject(flight.address, flight.tag, fake))

    @precondition(lambda self: self.world.fabric.history)
    @rule(order=until, which=index, into=index, kind=st.sampled_from(REPLAYS), flip=flips,
          first=st.booleans())  # fmt: skip
    def replay(
        self, order: list[int], which: int, into: int, kind: str, flip: int | None, first: bool
    ) -> None:
        """What was sent once comes again: where it was, or into a transfer that is under way, its own
        or another one; there perhaps under the names that are right in it.
        """
        world = self.world
        world.go(order, world.waiting_receives)
        waiting = world.waiting_receives()
        history = world.fabric.history
        if kind == "late":
            world.fabric.inject(*history[-1 - which % len(history)], flip=flip)
            return
        if not waiting:
            return
        address, tag = waiting[into % len(waiting)]
        own = kind == "again"
        fitting = [data for _, used, data in history if (used == tag) is own]
        if not fitting:
            return
        data = fitting[-1 - which % len(fitting)]
        if kind == "renamed":
            data = world.renamed(data, tag)
        flight = world.fabric.inject(address, tag, data, flip=flip if own else None)
        if first:
            world.hurry(flight)

    # ---- what goes wrong at either end

    @precondition(lambda self: self.world.clients)
    @rule(which=index, amid=st.booleans(), go=until)
    def cancel(self, which: int, amid: bool, go: list[int]) -> None:
        """At any time, or while a message is on its way into its blocks."""
        client = None
        if amid:
            self.world.go(go, self.world.receiving)
            client = self.world.client_amid(which)
        self.world.cancel(client or self.world.clients[-1 - which % len(self.world.clients)])

    @precondition(lambda self: self.faults < 4)
    @rule(
        name=st.sampled_from("PQDE"),
        kind=st.sampled_from(AT_THE_ENDS),
        amid=st.booleans(),
        go=until,
    )
    def strike(self, name: str, kind: str, amid: bool, go: list[int]) -> None:
        world = self.world
        if name not in world.workers:
            return
        self.faults += 1
        if amid:
            world.go(go, world.receiving)
        match kind:
            case "die":
                world.kill(name)
            case "cut":
                world.cut(name)
            case "sleep":
                world.sleep(name)

    @rule(name=st.sampled_from("PQDE"), which=index)
    def repeat_a_report(self, name: str, which: int) -> None:
        if name in self.world.workers:
            self.world.repeat_report(name, which)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.world.quiesce()
            finally:
                self.world.close()


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(
    max_examples=60 * EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=EXAMPLES == 1,
    print_blob=True,
    suppress_health_check=list(HealthCheck),  # a busy machine is not a finding
)
