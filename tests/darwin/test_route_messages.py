"""Messages of PF_ROUTE, byte by byte, against layouts written down from XNU's headers (encoding.py and the literals
here). They were not recorded on a Mac.
"""

from __future__ import annotations

import socket
import struct

import pytest

from darwin import encoding
from ztun.platform.darwin import messages, netstate, numbers
from ztun.platform.darwin.calls import Done
from ztun.platform.darwin.messages import AddressMessage, InterfaceMessage, RouteMessage, parse
from ztun.ports import Link

# bsd/net/route.h, struct rt_msghdr (92 bytes); then sockaddr_in 0.0.0.0, sockaddr_in 192.168.1.1, a netmask of length
# 0, and sockaddr_dl of en0, whose MAC address is 3c:22:fb:01:02:03. As `route -n get default` would get it on a
# little-endian machine.
DEFAULT_ROUTE = bytes.fromhex(
    "9400 05 04 0b00 0000 03080000 17000000 00000000 01000000 00000000 00000000 00000000"  # length 148, type RTM_GET
    + "00000000" * 14  # struct rt_metrics
    + "10 02 0000 00000000 0000000000000000"  # RTA_DST: sin_len, sin_family, sin_port, sin_addr, sin_zero
    + "10 02 0000 c0a80101 0000000000000000"  # RTA_GATEWAY
    + "00000000"  # RTA_NETMASK: length 0 takes 4 bytes
    + "14 12 0b00 06 03 06 00 656e30 3c22fb010203 000000"  # RTA_IFP: len, family, index, type, nlen, alen, slen
)
# bsd/net/if.h, struct if_msghdr (16 bytes and 96 of struct if_data) and the sockaddr_dl of en0.
EN0_IS_UP = bytes.fromhex(
    "8400 05 0e 10000000 63880000 0b00 0000" + "00" * 96 + "14 12 0b00 06 03 06 00 656e30 3c22fb010203 000000"
)
# bsd/net/if.h, struct ifa_msghdr (20 bytes); a netmask of 7 bytes (/24), padded to 8; sockaddr_in 192.168.1.5.
NEW_ADDRESS = bytes.fromhex(
    "2c00 05 0c 24000000 00000000 0b00 0000 00000000" + "07 02 0000 ffffff 00" + "10 02 0000 c0a80105 0000000000000000"
)

little_endian = struct.pack("=H", 1) == b"\1\0"
assert little_endian, "the literals are those of a little-endian machine"


def test_sizes_of_the_structs() -> None:
    """sizeof on a 64-bit macOS, as the headers add up."""
    assert messages._ROUTE.size == 92
    assert messages._INTERFACE.size == 112
    assert messages._ADDRESS.size == 20


def test_a_default_route() -> None:
    [message] = parse(DEFAULT_ROUTE)
    assert isinstance(message, RouteMessage)
    assert (message.type, message.ifindex, message.flags, message.error) == (numbers.RTM_GET, 11, 0x803, 0)
    found = message.addresses
    assert messages.address_of(found[numbers.RTA_DST]) == bytes(4)
    assert messages.address_of(found[numbers.RTA_GATEWAY]) == socket.inet_aton("192.168.1.1")
    assert messages.length_of(found[numbers.RTA_NETMASK], numbers.AF_INET) == 0
    assert messages.link_name(found[numbers.RTA_IFP]) == "en0"
    assert messages.link_address(found[numbers.RTA_IFP]) == bytes.fromhex("3c22fb010203")


def test_an_interface_and_its_address() -> None:
    link, address = parse(EN0_IS_UP + NEW_ADDRESS)
    assert isinstance(link, InterfaceMessage)
    assert isinstance(address, AddressMessage)
    assert netstate.list_links([link]) == {"en0": Link("en0", 11, True, True)}
    assert netstate.list_addresses([link, address]) == [("en0", socket.inet_aton("192.168.1.5"), 24)]


def test_the_encoder_of_the_other_tests_writes_the_same_bytes() -> None:
    named = {
        encoding.DST: encoding.sockaddr("0.0.0.0"),
        encoding.GATEWAY: encoding.sockaddr("192.168.1.1"),
        encoding.NETMASK: encoding.netmask(0, encoding.AF_INET),
        encoding.IFP: encoding.sockaddr_dl(11, "en0", bytes.fromhex("3c22fb010203")),
    }
    flags = encoding.UP | encoding.HAS_GATEWAY | encoding.STATIC
    made = encoding.rt_msghdr(encoding.RTM_GET, 11, flags, named)
    assert made[:16] + made[20:] == DEFAULT_ROUTE[:16] + DEFAULT_ROUTE[20:]  # but the pid


@pytest.mark.parametrize("length", [0, 1, 7, 8, 15, 24, 31, 32])
def test_netmasks_are_cut_off(length: int) -> None:
    assert messages.length_of(encoding.netmask(length, encoding.AF_INET), numbers.AF_INET) == length


@pytest.mark.parametrize("length", [0, 1, 10, 48, 64, 127, 128])
def test_netmasks_of_ipv6_are_cut_off(length: int) -> None:
    assert messages.length_of(encoding.netmask(length, encoding.AF_INET6), numbers.AF_INET6) == length


def test_a_scope_inside_a_link_local_address_is_taken_out() -> None:
    """KAME keeps the interface's index in the second 16 bits inside the kernel."""
    inside = bytes.fromhex("1c1e0000 00000000 fe80000b000000000000000000000001 00000000")
    assert messages.address_of(inside) == socket.inet_pton(socket.AF_INET6, "fe80::1")


def test_what_is_cut_off_or_of_another_kind_is_left_out() -> None:
    other_version = DEFAULT_ROUTE[:2] + b"\4" + DEFAULT_ROUTE[3:]
    other_type = EN0_IS_UP[:3] + b"\x12" + EN0_IS_UP[4:]  # RTM_IFINFO2
    assert list(parse(other_version + other_type)) == []
    assert len(list(parse(other_version + NEW_ADDRESS + other_type + EN0_IS_UP))) == 2
    for end in range(len(DEFAULT_ROUTE)):
        assert list(parse(DEFAULT_ROUTE[:end])) == []
    for end in range(92, len(DEFAULT_ROUTE)):  # one that says it is shorter than its addresses
        short = struct.pack("=H", end) + DEFAULT_ROUTE[2:end]
        assert len(list(parse(short))) == 1
    assert list(parse(b"\0" * 64)) == []


class Dumps:
    """Calls whose dumps are given."""

    def __init__(self, interfaces: bytes, routes: bytes) -> None:
        self._dumps = {numbers.NET_RT_IFLIST: interfaces, numbers.NET_RT_DUMP: routes}

    def dump(self, what: int, argument: int = 0) -> bytes:
        return self._dumps[what]

    def run(self, argv: object) -> Done:
        raise AssertionError("nothing is run")


MAC_INTERFACES = b"".join(
    [
        encoding.if_msghdr(1, 0x8049, "lo0"),
        encoding.ifa_msghdr(encoding.RTM_NEWADDR, 1, "127.0.0.1", 8),
        encoding.if_msghdr(11, 0x8863, "en0"),
        encoding.ifa_msghdr(encoding.RTM_NEWADDR, 11, "fe80::1", 64),
        encoding.ifa_msghdr(encoding.RTM_NEWADDR, 11, "192.168.1.5", 24),
        encoding.if_msghdr(15, 0x8051, "utun3"),
        encoding.ifa_msghdr(encoding.RTM_NEWADDR, 15, "100.64.0.7", 32),
        encoding.if_msghdr(16, 0x8802, "en5"),
    ]
)
MAC_ROUTES = b"".join(
    [
        encoding.route("0.0.0.0", 0, 11, "192.168.1.1"),
        encoding.route("0.0.0.0", 0, 16, "172.16.0.1", encoding.UP | encoding.IFSCOPE),  # of en5 alone
        encoding.route("192.168.1.0", 24, 11),
        encoding.route("192.168.1.77", 32, 11, None, encoding.UP | encoding.LLINFO | encoding.WASCLONED),
        encoding.route("10.0.0.0", 8, 15),  # another VPN's
        encoding.route("198.51.100.0", 24, 11, None, encoding.STATIC),  # not up
    ]
)


@pytest.mark.parametrize(
    ("destination", "way"),
    [
        ("9.9.9.9", ("en0", "192.168.1.5", "192.168.1.1")),
        ("192.168.1.77", ("en0", "192.168.1.5", None)),
        ("10.1.2.3", ("utun3", "100.64.0.7", None)),
        ("198.51.100.1", ("en0", "192.168.1.5", "192.168.1.1")),
        ("192.168.1.5", ("lo0", "192.168.1.5", None)),
        ("127.0.0.1", ("lo0", "127.0.0.1", None)),
    ],
)
def test_the_way_of_our_own_packets(destination: str, way: tuple[str, str, str | None]) -> None:
    state = netstate.read_state(Dumps(MAC_INTERFACES, MAC_ROUTES), [destination, "2620:fe::9"])  # type: ignore[arg-type]
    path = state.paths[destination]
    assert path is not None
    assert path[:3] == way
    assert state.paths["2620:fe::9"] is None
    assert state.exits == {"en0": [4]}
    assert state.links["en5"] == Link("en5", 16, False, False)
