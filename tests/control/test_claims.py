"""What instances of one network namespace cannot share, claimed by real processes in namespaces of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from ztun.config import Settings, settings_from_proxy
from ztun.control.claims import CONTROL, RANGE, Claim, Claimed, Claims, claims_of, holders, sockets_in_use

HOLD = """
import sys
from ztun.control.claims import Claim, Claims
claims = Claims()
claims.acquire([Claim(*pair.split("=", 1), "key", "remedy") for pair in sys.argv[1:]])
print("held", flush=True)
sys.stdin.read()
"""
_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A network namespace without any instance, for this thread and what it starts."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert _libc.unshare(_CLONE_NEWNET) == 0
        yield
    finally:
        assert _libc.setns(before, _CLONE_NEWNET) == 0
        os.close(before)


@contextmanager
def other(*claims: str, wrapper: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    argv = [*wrapper, sys.executable, "-c", HOLD, *claims]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def lan(name: str) -> Claim:
    return Claim("lan", name, "capture.lan", "leave it out of one")


def fake(network: str) -> Claim:
    return Claim(RANGE, network, "dns.fake_ip.range", "give each a range of its own")


def settings(**sections: object) -> Settings:
    return Settings(**sections)  # type: ignore[arg-type]


def test_who_comes_second_is_told_who_has_it_and_holds_nothing() -> None:
    claims = Claims()
    with other("lan=eth1") as first:
        with pytest.raises(Claimed) as caught:
            claims.acquire([lan("eth2"), lan("eth1")])
        assert (
            str(caught.value) == f"capture.lan: eth1 is in use by another ztun (pid {first.pid}); leave it out of one"
        )
        assert [one.value for one in holders()] == ["eth1"]
        claims.acquire([lan("eth2")])
        assert sorted(one.value for one in holders()) == ["eth1", "eth2"]
        claims.release()
        claims.release()


def test_the_line_says_how_to_reach_the_other_one() -> None:
    with other("lan=eth1", f"{CONTROL}=/run/ztun/one.sock") as first:
        assert sockets_in_use() == [("/run/ztun/one.sock", first.pid)]
        with pytest.raises(Claimed, match=rf"\(pid {first.pid}, --socket /run/ztun/one.sock\); leave"):
            Claims().acquire([lan("eth1")])


def test_a_killed_one_has_nothing_any_more() -> None:
    with other("lan=eth1") as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        claims = Claims()
        claims.acquire([lan("eth1")])
        assert [(one.value, one.pid) for one in holders()] == [("eth1", os.getpid())]
        claims.release()


@pytest.mark.parametrize("mine", ["198.18.0.0/15", "198.18.0.0/16", "198.0.0.0/8", "198.19.255.255/32"])
def test_ranges_that_overlap_are_refused(mine: str) -> None:
    with other(f"{RANGE}=198.18.0.0/15") as first:
        what = mine if mine == "198.18.0.0/15" else f"{mine} overlaps 198.18.0.0/15, which"
        with pytest.raises(Claimed, match=rf"range: {what} is in use by another ztun \(pid {first.pid}\); give each"):
            Claims().acquire([fake(mine)])
        assert len(holders()) == 1


def test_ranges_side_by_side_are_fine() -> None:
    claims = Claims()
    with other(f"{RANGE}=198.18.0.0/16"):
        claims.acquire([fake("198.19.0.0/16"), fake("2001:2::/48")])
        claims.release()


def test_another_network_namespace_is_another_world() -> None:
    with other("lan=eth1"):
        assert _libc.unshare(_CLONE_NEWNET) == 0
        claims = Claims()
        claims.acquire([lan("eth1")])
        assert [(one.value, one.pid) for one in holders()] == [("eth1", os.getpid())]
        claims.release()


def test_somebody_without_rights_keeps_nobody_from_starting() -> None:
    # It may read everything, since the repository may lie below /root; the rest of root's power is gone.
    power = [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    with other("lan=eth1", wrapper=["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *power]):
        Claims().acquire([lan("eth1")])


def test_other_sockets_with_odd_names_are_no_claims() -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as two,
    ):
        one.bind(b"\0ztun/1/")
        two.bind(b"\0ztun/1/fake-ip/not a network\n\xff")
        assert {(one.kind, one.pid) for one in holders()} == {("", os.getpid()), (RANGE, os.getpid())}
        claims = Claims()
        claims.acquire([fake("198.18.0.0/15")])
        claims.release()


def test_a_name_that_is_too_long_is_left_unclaimed() -> None:
    Claims().acquire([Claim(CONTROL, "/" + "x" * 106, "control.socket", "")])
    assert holders() == []


def test_what_settings_need() -> None:
    made = settings(
        tun={"name": "ztun1"},
        capture={"lan": ["eth1", "eth2"], "host": True},
        dns={"listen": ["10.0.0.1:53"], "fake_ip": {"range": "198.19.0.0/16", "range6": None}},
        control={"socket": "/run/other.sock"},
    )
    assert [claim[:3] for claim in claims_of(made)] == [
        ("tun", "ztun1", "tun.name"),
        ("lan", "eth1", "capture.lan"),
        ("lan", "eth2", "capture.lan"),
        ("host", "this host's own traffic", "capture.host"),
        (RANGE, "198.19.0.0/16", "dns.fake_ip.range"),
        ("dns", "10.0.0.1:53", "dns.listen"),
        (CONTROL, "/run/other.sock", "control.socket"),
    ]


@pytest.mark.parametrize(("one", "two"), [("198.18.0.0/15", "198.19.0.0/16"), ("198.19.0.0/16", "198.18.0.0/15")])
def test_the_remedy_is_one_that_works_for_both(one: str, two: str) -> None:
    with other(f"{RANGE}={one}"), pytest.raises(Claimed, match=r"of its own, as 198.18.0.0/16 and 198.19.0.0/16$"):
        Claims().acquire([fake(two)])


def test_by_default_the_addresses_for_dns_are_left_to_the_kernel() -> None:
    by_default = [claim.key for claim in claims_of(settings_from_proxy("socks5://192.0.2.1:1080", ["eth1"]))]
    assert "dns.listen" not in by_default
