"""From addresses to an outbound and a destination."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address, ip_network

import pytest

from ztun.gateway.routing import Router, UnmappedError
from ztun.names.pool import FakeIpPool
from ztun.ports import RULE_DEFAULT, DatagramHandler, DatagramLink, Destination, Origin, OutboundError
from ztun.rules import Rule, Rules

CLIENT = ip_address("10.0.0.7").packed


class Way:
    """An outbound that nobody dials here."""

    type = "way"

    def __init__(self, tag: str) -> None:
        self.tag = tag

    async def connect(self, destination: Destination) -> socket.socket:
        raise AssertionError(destination)

    async def open_datagrams(
        self, on_datagram: DatagramHandler, on_failure: Callable[[OutboundError], None]
    ) -> DatagramLink:
        raise AssertionError

    async def close(self) -> None:
        raise AssertionError


OFFICE, WEB, DIRECT = Way("office"), Way("web"), Way("direct")


def packed(address: str) -> bytes:
    return ip_address(address).packed


@pytest.fixture
def names() -> FakeIpPool:
    return FakeIpPool(ip_network("198.18.0.0/15"), ip_network("2001:2::/48"), 16, 0.0, None)


@pytest.fixture
def router(names: FakeIpPool) -> Router:
    rules = Rules(
        [
            Rule("web", ip_cidr=(ip_network("192.0.2.0/24"),), ports=((80, 80),)),
            Rule("direct", domain_suffix=("example",)),
            Rule("dns", ports=((5353, 5353),)),
        ],
        "office",
    )
    return Router(rules, names, {way.tag: way for way in (OFFICE, WEB, DIRECT)}, hijack_dns=True)


def test_a_fake_ip_goes_out_under_its_name(router: Router, names: FakeIpPool) -> None:
    fake = names.assign("www.test", 0.0)
    assert fake.v6 is not None
    for address in (fake.v4, fake.v6):
        route = router.route("tcp", CLIENT, address, 443)
        assert route == (OFFICE, Destination("www.test", 443), RULE_DEFAULT, True)


def test_an_address_goes_out_as_it_is(router: Router) -> None:
    route = router.route("tcp", CLIENT, packed("2001:db8::1"), 443)
    assert route == (OFFICE, Destination("2001:db8::1", 443), RULE_DEFAULT, False)


def test_a_fake_ip_without_a_name_is_never_dialled(router: Router) -> None:
    with pytest.raises(UnmappedError):
        router.route("tcp", CLIENT, packed("198.18.0.9"), 443)


def test_port_53_and_rules_with_the_target_dns_are_answered_here(router: Router) -> None:
    for port in (53, 5353):
        assert router.route("udp", CLIENT, packed("203.0.113.9"), port).outbound is None


def test_the_address_of_a_direct_name_stays_direct_where_only_some_ports_are_not(router: Router) -> None:
    address = packed("192.0.2.1")
    assert router.route("tcp", CLIENT, address, 443).outbound is OFFICE
    router.remember(address, 1)
    assert router.route("tcp", CLIENT, address, 443).outbound is DIRECT
    assert router.route("tcp", CLIENT, address, 80).outbound is WEB


def test_where_a_client_is_gets_asked_only_by_rules_that_need_it(names: FakeIpPool) -> None:
    asked: list[bytes] = []
    place = Origin("guest", None)

    def origin(address: bytes) -> Origin | None:
        asked.append(address)
        return place

    ways = {way.tag: way for way in (OFFICE, WEB, DIRECT)}
    router = Router(Rules([], "office"), names, ways, hijack_dns=True, origins=origin)
    assert router.route("tcp", CLIENT, packed("192.0.2.1"), 80).outbound is OFFICE
    assert asked == []
    router.replace_rules(Rules([Rule("web", interface=("guest",))], "office"))
    assert router.route("tcp", CLIENT, packed("192.0.2.1"), 80).outbound is WEB
    assert asked == [CLIENT]
    place = Origin("lan0", None)  # it moved
    assert router.route("tcp", CLIENT, packed("192.0.2.1"), 80).outbound is OFFICE


def test_other_rules_decide_anew_about_what_was_decided_before(router: Router) -> None:
    assert router.route("tcp", CLIENT, packed("192.0.2.1"), 443).outbound is OFFICE
    router.replace_rules(Rules([], "web"))
    assert router.route("tcp", CLIENT, packed("192.0.2.1"), 443).outbound is WEB
