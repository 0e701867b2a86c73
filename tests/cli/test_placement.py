"""What follows from this host's addresses, as they come and go."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

from ztun.errors import ZtunError
from ztun.machine import InterfaceAddress
from ztun.placement import Listening, Placement
from ztun.ports import RULE_BUILTIN
from ztun.rules import FlowInfo, Rules

LAN4 = InterfaceAddress("lan0", ip_address("10.0.0.1").packed, 24)
LAN6 = InterfaceAddress("lan0", ip_address("2001:db8::1").packed, 64)
LINK_LOCAL = InterfaceAddress("lan0", ip_address("fe80::1").packed, 64)
WAN4 = InterfaceAddress("wan0", ip_address("192.0.2.1").packed, 24)


class Doors:
    """In the place of DnsService.start: where it listens, and what is not free."""

    def __init__(self, *taken: str) -> None:
        self.open: list[str] = []
        self.asked: list[str] = []
        self.taken = set(taken)

    async def start(self, endpoints: Sequence[str]) -> None:
        self.asked += endpoints
        for text in endpoints:
            if text in self.taken:
                raise ZtunError(f"{text} is taken by another program")
        self.open += endpoints


async def test_it_answers_on_the_addresses_that_lan_interfaces_get() -> None:
    doors = Doors()
    listening = Listening(None, ["lan0"], doors.start)
    await listening.follow([WAN4, LINK_LOCAL])
    assert doors.open == []
    await listening.follow([WAN4, LAN4, LINK_LOCAL])
    await listening.follow([WAN4, LAN4, LAN6, LINK_LOCAL])
    assert doors.open == ["10.0.0.1:53", "[2001:db8::1]:53"]


async def test_it_answers_where_it_is_told_to_once_the_address_is_there() -> None:
    doors = Doors()
    listening = Listening(["192.0.2.1:5353", "10.0.0.1:53"], ["lan0"], doors.start)
    await listening.begin(["192.0.2.1:5353"])
    await listening.follow([WAN4, LAN6])
    assert doors.open == ["192.0.2.1:5353"]
    await listening.follow([WAN4, LAN4])
    assert doors.open == ["192.0.2.1:5353", "10.0.0.1:53"]


async def test_an_address_that_goes_and_comes_back_is_listened_on_still() -> None:
    doors = Doors()
    listening = Listening(None, ["lan0"], doors.start)
    for addresses in ([LAN4], [], [LAN4]):
        await listening.follow(addresses)
    assert doors.asked == ["10.0.0.1:53"]


async def test_what_is_taken_is_tried_again_at_each_change() -> None:
    doors = Doors("10.0.0.1:53")
    listening = Listening(None, ["lan0"], doors.start)
    await listening.follow([LAN4, LAN6])
    assert doors.open == ["[2001:db8::1]:53"]
    doors.taken.clear()
    await listening.follow([LAN4, LAN6, WAN4])
    assert doors.open == ["[2001:db8::1]:53", "10.0.0.1:53"]


def decide(placement: Placement, address: str) -> tuple[str, int]:
    return placement.rules.decide(FlowInfo("tcp", b"", ip_address(address).packed, None, 80))


def test_networks_become_own_and_cease_to_be() -> None:
    placement = Placement(Rules(default="proxy"), [ip_network("198.18.0.0/15")], {}.__getitem__)
    placement.place([LAN4])
    assert decide(placement, "10.0.0.77") == ("direct", RULE_BUILTIN)
    assert decide(placement, "192.0.2.77").outbound == "proxy"
    placement.place([WAN4])
    assert decide(placement, "10.0.0.77").outbound == "proxy"
    assert decide(placement, "192.0.2.77") == ("direct", RULE_BUILTIN)


def test_what_changes_nothing_is_not_placed_again() -> None:
    """Compiling the prefixes of a country takes seconds, and link-local addresses come and go with every flap."""
    placement = Placement(Rules(default="proxy"), [], {}.__getitem__)
    placement.place([LAN4, LAN6, LINK_LOCAL])
    rules = placement.rules
    placement.place([LAN6, LAN4])
    assert placement.rules is rules
