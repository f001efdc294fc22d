"""What the router believes of a worker's sleep, and what it does with one that sleeps."""

from itertools import product
from pathlib import Path

import pytest

from kvrelay_protocol import fleet_pb2 as pb
from kvrelay_protocol.versions import JOIN_VERSION
from kvrelay_router.config import RouterConfig
from kvrelay_router.fleet.registry import WorkerRegistry
from kvrelay_router.fleet.slumber import Rest, Slumber
from kvrelay_router.scaling.rest import rest

LAYOUT = pb.KvLayout(block_size=16, num_layers=2, num_kv_heads=2, head_dim=8, protocol_version=1)


def state(asleep: bool, order: int) -> pb.SleepState:
    return pb.SleepState(asleep=asleep, order=order)


def test_sleep_and_wake_are_orders_with_numbers():
    slumber = Slumber(asleep=False)
    assert slumber.sleep().sleep.order == 1
    assert (slumber.rest, slumber.awake) == (Rest.FALLING, False)
    assert slumber.told(state(True, 1))
    assert slumber.rest is Rest.ASLEEP
    assert slumber.wake().wake.order == 2
    assert (slumber.rest, slumber.awake) == (Rest.WAKING, False)
    assert slumber.told(state(False, 2))
    assert slumber.awake


@pytest.mark.parametrize("rest", Rest)
def test_what_is_so_or_under_way_is_not_ordered_again(rest):
    slumber = Slumber(asleep=False)
    slumber.rest = rest
    assert (slumber.sleep() is None) == (rest in {Rest.FALLING, Rest.ASLEEP})
    slumber.rest = rest
    assert (slumber.wake() is None) == (rest in {Rest.AWAKE, Rest.RETIRING, Rest.WAKING})
    assert slumber.rest in {Rest.AWAKE, Rest.WAKING}


def test_one_that_retires_knows_nothing_of_it_and_is_called_back_without_a_word():
    slumber = Slumber(asleep=False)
    slumber.retire()
    assert not slumber.awake
    assert not slumber.told(state(False, 0))
    assert slumber.wake() is None
    assert slumber.awake
    slumber.retire()
    assert slumber.sleep().sleep.order == 1
    slumber.retire()
    assert slumber.rest is Rest.FALLING


def test_a_worker_with_work_is_awake_again():
    slumber = Slumber(asleep=False)
    slumber.sleep()
    assert slumber.told(state(False, 1))
    assert slumber.awake


def test_an_answer_to_an_order_that_is_over_is_no_news():
    slumber = Slumber(asleep=False)
    slumber.sleep()
    slumber.wake()
    assert not slumber.told(state(True, 1))
    assert not slumber.told(state(False, 1))
    assert slumber.rest is Rest.WAKING
    slumber.sleep()
    assert not slumber.told(state(False, 2))
    assert slumber.rest is Rest.FALLING


def test_a_worker_that_work_woke_is_awake_without_an_order():
    slumber = Slumber(asleep=True)
    assert slumber.rest is Rest.ASLEEP
    assert slumber.told(state(False, 0))
    assert slumber.awake
    assert not slumber.told(state(False, 0))


class Worker:
    """Carries out orders as they come, or refuses to sleep; its answers wait until they are read."""

    def __init__(self, busy):
        self.busy, self.asleep, self.answers = busy, False, []

    def obey(self, message):
        if message.WhichOneof("message") == "sleep":
            self.asleep = self.asleep or not self.busy
            order = message.sleep.order
        else:
            self.asleep, order = False, message.wake.order
        self.answers.append(state(self.asleep, order))


@pytest.mark.parametrize("busy", [False, True])
def test_whatever_the_order_of_orders_and_answers_both_agree_in_the_end(busy):
    for script in product(("retire", "sleep", "wake", "obey", "read"), repeat=5):
        slumber, worker, sent = Slumber(asleep=False), Worker(busy), []

        def step(what, slumber=slumber, worker=worker, sent=sent):
            if what == "obey" and sent:
                worker.obey(sent.pop(0))
            elif what == "read" and worker.answers:
                slumber.told(worker.answers.pop(0))
            elif what in {"sleep", "wake"}:
                sent += filter(None, [getattr(slumber, what)()])
            elif what == "retire":
                slumber.retire()
            # Who is given work is awake, and nothing on its way to it says otherwise.
            assert not slumber.awake or (not worker.asleep and not sent)

        for what in (*script, *["obey"] * 5, *["read"] * 5):
            step(what)
        awake = {Rest.AWAKE, Rest.RETIRING}
        assert slumber.rest in ({Rest.ASLEEP} if worker.asleep else awake), script


# ---- the registry


class Listener:
    def __init__(self):
        self.rests = []

    def worker_joined(self, link):
        pass

    def worker_message(self, link, message):
        raise AssertionError("nothing for the requests")

    def worker_rests(self, link):
        self.rests.append((link.name, link.slumber.rest))


class Fleet:
    def __init__(self, *names, asleep=()):
        self.registry = WorkerRegistry(RouterConfig(Path("unused"), "demo"), clock=lambda: 0.0)
        self.heard = self.registry.listener = Listener()
        self.links = [
            self.registry.join(
                pb.Hello(
                    protocol_version=JOIN_VERSION,
                    worker_name=name,
                    role=pb.ROLE_DECODE,
                    model="demo",
                    kv_layout=LAYOUT,
                    asleep=name in asleep,
                )
            )
            for name in names
        ]

    def rests(self):
        return {link.name: link.slumber.rest for link in self.links}

    def answer(self, name, asleep):
        link = self.registry.get(name)
        message = pb.WorkerMessage(sleep_state=state(asleep, link.slumber._order))
        self.registry.received(link, message)


async def test_a_worker_is_out_of_placement_from_the_order_to_sleep_until_it_says_that_it_is_awake():
    fleet = Fleet("d0")
    (link,) = fleet.links
    assert [w.name for w in fleet.registry.states()] == ["d0"]
    for act in (
        lambda: fleet.registry.sleep(link),
        lambda: fleet.answer("d0", True),
        lambda: fleet.registry.wake(link),
    ):
        act()
        assert fleet.registry.states() == []
    fleet.answer("d0", False)
    assert [w.name for w in fleet.registry.states()] == ["d0"]
    rests = [Rest.FALLING, Rest.ASLEEP, Rest.WAKING, Rest.AWAKE]
    assert fleet.heard.rests == [("d0", rest) for rest in rests]


async def test_who_joins_asleep_is_given_nothing():
    fleet = Fleet("d0", "d1", asleep=("d0",))
    assert [w.name for w in fleet.registry.states()] == ["d1"]


# ---- who is told


async def test_a_pool_at_zero_sleeps_and_one_with_work_gets_no_more_of_it_first():
    fleet = Fleet("d0", "d1", "d2", asleep=("d2",))
    fleet.links[1].attempts.add(7)
    assert not rest(fleet.registry, fleet.links, 0, 3)
    assert fleet.rests() == {"d0": Rest.FALLING, "d1": Rest.RETIRING, "d2": Rest.ASLEEP}
    assert fleet.registry.states() == []
    fleet.links[1].attempts.clear()
    rest(fleet.registry, fleet.links, 0, 3)
    assert fleet.rests()["d1"] is Rest.FALLING


async def test_who_finishes_its_work_to_sleep_is_called_back_at_once():
    fleet = Fleet("d0")
    fleet.links[0].attempts.add(7)
    rest(fleet.registry, fleet.links, 0, 1)
    assert not rest(fleet.registry, fleet.links, 1, 0)
    assert fleet.rests() == {"d0": Rest.AWAKE}
    assert fleet.heard.rests == [("d0", Rest.RETIRING), ("d0", Rest.AWAKE)]


async def test_whoever_neither_serves_nor_sleeps_is_the_providers_to_end():
    fleet = Fleet("d0", "d1", "d2")
    assert not rest(fleet.registry, fleet.links, 1, 1)
    assert fleet.rests() == {"d0": Rest.AWAKE, "d1": Rest.FALLING, "d2": Rest.AWAKE}


async def test_as_many_wake_as_are_wanted_the_first_by_name_and_once():
    names = ("d10", "d2", "d1")
    fleet = Fleet(*names, asleep=names)
    assert rest(fleet.registry, fleet.links, 1, 2)
    assert fleet.rests() == {"d1": Rest.WAKING, "d2": Rest.ASLEEP, "d10": Rest.ASLEEP}
    assert not rest(fleet.registry, fleet.links, 1, 2)
    assert rest(fleet.registry, fleet.links, 2, 1)
    assert fleet.rests()["d2"] is Rest.WAKING
    fleet.answer("d1", False)
    assert not rest(fleet.registry, fleet.links, 2, 1)
    assert fleet.rests()["d10"] is Rest.ASLEEP
