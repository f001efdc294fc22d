"""Clients that leave in the middle of an answer, or stop reading it for a while."""

import random
from collections.abc import Sequence

from kvrelay_chaos.faults.base import ClientOrder, Kind, Surroundings, between
from kvrelay_chaos.plan import Fault, Parameters
from kvrelay_chaos.shape import Shape


class _OfClient(Kind):
    """Done by the next client that reads as far as `after_pieces`."""

    cost_s = 0.1

    def targets(self, shape: Shape) -> Sequence[str]:
        return ("clients",)


class Disconnect(_OfClient):
    """A client closes its connection before the answer is whole."""

    name = "client_disconnect"
    weight = 10.0

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"after_pieces": dice.randint(0, 12)}

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        pieces = int(fault.parameters["after_pieces"])
        await around.clients.until_hit(ClientOrder(leaves=True, after_pieces=pieces))
        return True


class SlowReader(_OfClient):
    """A client with a small receive buffer stops reading for a while, and then goes on."""

    name = "client_slow"
    weight = 5.0

    def draw(self, dice: random.Random, target: str) -> Parameters:
        return {"after_pieces": dice.randint(1, 6), "seconds": between(dice, 0.1, 2.0)}

    async def fire(self, fault: Fault, around: Surroundings) -> bool:
        given = fault.parameters
        order = ClientOrder(
            leaves=False, after_pieces=int(given["after_pieces"]), seconds=float(given["seconds"])
        )
        await around.clients.until_hit(order)
        return True


CLIENT_KINDS = (Disconnect(), SlowReader())
