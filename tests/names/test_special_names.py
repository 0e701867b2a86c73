"""Special names, reverse names, and names fit for a proxy."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztun.names.special import Special, is_hostname, reverse_address, special


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("localhost", Special.LOOPBACK),
        ("db.localhost", Special.LOOPBACK),
        ("use-application-dns.net", Special.ABSENT),
        ("surely.invalid", Special.ABSENT),
        ("_dns.resolver.arpa", Special.EMPTY),
        ("hidden.onion", Special.ONION),
        ("printer.local", Special.LOCAL),
        ("nas.home.arpa", Special.LOCAL),
        ("nas", Special.LOCAL),
        ("com", Special.LOCAL),
        ("1.0.0.10.in-addr.arpa", Special.LOCAL),
        ("168.192.in-addr.arpa", Special.LOCAL),
        ("16.172.in-addr.arpa", Special.LOCAL),
        ("d.f.ip6.arpa", Special.LOCAL),
        ("mask-h2.icloud.com", Special.BLOCKED),
        ("", None),
        ("172.in-addr.arpa", None),
        ("192.in-addr.arpa", None),
        ("8.8.8.8.in-addr.arpa", None),
        ("in-addr.arpa", None),
        ("notlocalhost.example", None),
        ("localhost.example", None),
        ("mylocal.example", None),
        ("www.example.test", None),
    ],
)
def test_special_names(name: str, kind: Special | None) -> None:
    assert special(name) is kind


@given(st.ip_addresses())
def test_reverse_name_gives_the_address_back(address) -> None:
    assert reverse_address(address.reverse_pointer) == address.packed


@pytest.mark.parametrize(
    "name",
    [
        "0.18.198.in-addr.arpa",
        "1.2.3.4.5.in-addr.arpa",
        "256.0.18.198.in-addr.arpa",
        "x.0.18.198.in-addr.arpa",
        "²." + "0.0.0.in-addr.arpa",
        "0001.0.18.198.in-addr.arpa",
        ".0.18.198.in-addr.arpa",
        "10." + "0." * 31 + "ip6.arpa",
        "g." + "0." * 31 + "ip6.arpa",
        "1.0.18.198.in-addr.arpa.example",
        "arpa",
        "",
    ],
)
def test_what_is_no_reverse_name_gives_none(name: str) -> None:
    assert reverse_address(name) is None


def test_reverse_name_of_a_fake_ip() -> None:
    assert reverse_address("2.0.18.198.in-addr.arpa") == ip_address("198.18.0.2").packed


@pytest.mark.parametrize(
    "name", ["www.example", "a-b.c_d.EXAMPLE", "_dmarc.example", "xn--p1ai", "1and1.example", "0x.example"]
)
def test_name_that_a_proxy_may_have(name: str) -> None:
    assert is_hostname(tuple(name.encode().split(b".")))


@pytest.mark.parametrize(
    "labels",
    [
        (),
        (b"www.evil", b"example"),
        (b"a\r\nHost: b", b"example"),
        (b"a b", b"example"),
        (b"user@host", b"example"),
        (b"gr\xc3\xbcn", b"example"),
        (b"a/b", b"example"),
        (b"10", b"0", b"0", b"5"),
        (b"example", b"42"),
        (b"0x0a000005",),
        (b"a", b"0X"),
        (b"1:80",),
    ],
)
def test_name_that_no_proxy_must_see(labels: tuple[bytes, ...]) -> None:
    assert not is_hostname(labels)
