"""What the settings ask of the machine, against a real one: a network namespace with an interface of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from ztun import machine
from ztun.errors import ConfigError, ZtunError
from ztun.lab.namespace import Namespace
from ztun.machine import InterfaceAddress

LAN4, LAN6 = ip_address("10.77.0.1"), ip_address("2001:db8:77::1")
OWN = [ip_address("127.0.0.1"), LAN4, LAN6, ip_address("fe80::1")]
ADDRESSES = [
    InterfaceAddress("lo", b"\x7f\0\0\1", 8),
    InterfaceAddress("lan0", LAN4.packed, 24),
    InterfaceAddress("lan0", LAN6.packed, 64),
    InterfaceAddress("lan0", ip_address("fe80::1").packed, 64),
]
HOLD_PORT = ["socat", "-u", "udp4-recvfrom:53,bind=10.77.0.1", "-"]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Namespace]:
    namespace = Namespace(f"cli{os.getpid()}m")
    try:
        namespace.create(resolver="10.77.0.9", sysctls={})
        namespace.ip(
            "link add lan0 type veth peer name far0",
            f"address add {LAN4}/24 dev lan0",
            f"address add {LAN6}/64 dev lan0 nodad",
            "link set lan0 up",
            "link set far0 up",
        )
        yield namespace
    finally:
        namespace.delete()


@pytest.fixture
def taken(gateway: Namespace) -> Iterator[subprocess.Popen[Any]]:
    with gateway.spawn(*HOLD_PORT) as process:
        while "10.77.0.1:53" not in gateway.run("ss", "-Hlnu").stdout:
            assert process.poll() is None
        yield process
        process.kill()


def inside(gateway: Namespace, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    with gateway.entered():
        return asyncio.run(make())


def test_missing_lan_interfaces_are_named(gateway: Namespace) -> None:
    with gateway.entered():
        assert machine.absent_interfaces(["lan0", "eth9"]) == ["eth9"]


def test_addresses_of_this_machine_can_be_listened_on(gateway: Namespace) -> None:
    listen = ["10.77.0.1:53", "[2001:db8:77::1]:53", "127.0.0.1:5353", "0.0.0.0:53", "[::]:53"]
    inside(gateway, lambda: machine.check_listen(listen, OWN))


def test_an_address_of_no_interface_is_named_with_those_that_are(gateway: Namespace) -> None:
    with pytest.raises(ConfigError, match=r"dns\.listen\[1\]: 192\.0\.2\.1 is not .* use one of 10\.77\.0\.1, 2001:"):
        inside(gateway, lambda: machine.check_listen(["10.77.0.1:53", "192.0.2.1:53"], OWN))


def test_a_taken_port_names_the_program_that_holds_it(gateway: Namespace, taken: subprocess.Popen[Any]) -> None:
    with pytest.raises(
        ZtunError, match=rf"dns\.listen\[0\]: .*port 53 is taken by socat \(pid {taken.pid}\)"
    ) as caught:
        inside(gateway, lambda: machine.check_listen(["10.77.0.1:53"], OWN))
    assert not isinstance(caught.value, ConfigError)


def test_by_default_every_lan_address_answers_dns(gateway: Namespace) -> None:
    free, problems = inside(gateway, lambda: machine.default_listen(["lan0"], ADDRESSES))
    assert free == ["10.77.0.1:53", "[2001:db8:77::1]:53"], "neither loopback nor link-local"
    assert problems == []


def test_a_default_that_is_taken_is_told_and_left_out(gateway: Namespace, taken: subprocess.Popen[Any]) -> None:
    free, problems = inside(gateway, lambda: machine.default_listen(["lan0"], ADDRESSES))
    assert free == ["[2001:db8:77::1]:53"]
    assert problems == [f"10.77.0.1:53: port 53 is taken by socat (pid {taken.pid})"]


def test_an_address_that_is_still_being_detected_is_waited_for(gateway: Namespace) -> None:
    gateway.ip("address add 2001:db8:78::1/64 dev far0")
    address = ip_address("2001:db8:78::1")
    assert "tentative" in gateway.run("ip", "address", "show", "dev", "far0").stdout
    assert inside(gateway, lambda: machine.probe(address, 53)) is None


@pytest.mark.parametrize(
    ("text", "listen", "expected"),
    [
        ("nameserver 192.0.2.1\nnameserver 2001:db8::1\n", [], ["udp://192.0.2.1:53", "udp://[2001:db8::1]:53"]),
        ("nameserver 10.77.0.1\nnameserver 192.0.2.1\n", ["10.77.0.1:53"], ["udp://192.0.2.1:53"]),
        ("nameserver 10.77.0.1\nnameserver 192.0.2.1\n", ["0.0.0.0:53"], ["udp://192.0.2.1:53"]),
        ("nameserver 10.77.0.1\n", ["10.77.0.1:5353"], ["udp://10.77.0.1:53"]),
        ("nameserver 127.0.0.53\noptions edns0\n", ["10.77.0.1:53"], ["udp://127.0.0.53:53"]),
        ("nameserver 10.77.0.1\n", ["10.77.0.1:53"], [machine.FALLBACK_SERVER]),
        ("# nameserver 192.0.2.1\nnameserver\nnameserver nonsense\n", [], [machine.FALLBACK_SERVER]),
        ("", [], [machine.FALLBACK_SERVER]),
    ],
)
def test_upstream_resolvers_are_those_of_the_system_but_never_ourselves(
    text: str, listen: list[str], expected: list[str]
) -> None:
    assert machine.default_servers(text, listen, OWN) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["nameserver 192.0.2.1"], ["udp://192.0.2.1:53"]),
        (["nameserver 127.0.0.1\nnameserver 192.0.2.1"], ["udp://192.0.2.1:53"]),
        (["nameserver 127.0.0.53", "nameserver 192.0.2.2\nsearch lan"], ["udp://192.0.2.2:53"]),
        (["nameserver ::1", "", "nameserver 2001:db8::1"], ["udp://[2001:db8::1]:53"]),
        (["nameserver 127.0.0.53", "nameserver 127.0.0.1"], [machine.FALLBACK_SERVER]),
        ([], [machine.FALLBACK_SERVER]),
    ],
)
def test_a_resolver_of_this_host_is_not_asked_for_what_it_asks_us(
    tmp_path: Path, files: list[str], expected: list[str]
) -> None:
    paths = [tmp_path / str(number) for number, _ in enumerate(files)]
    for path, text in zip(paths, files, strict=True):
        path.write_text(text)
    found = machine.read_real_resolv_conf([*paths, tmp_path / "absent"])
    assert machine.default_servers(found, [], OWN) == expected


def test_without_privilege_the_remedy_is_named() -> None:
    program = "from ztun import machine; machine.require_privilege()"
    machine.require_privilege()
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "needs root (CAP_NET_ADMIN) to change the network; run it with sudo" in done.stderr
