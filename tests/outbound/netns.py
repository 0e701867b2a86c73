"""Two network namespaces and a cable between them: a client with a real router in front of it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000  # linux/sched.h

CLIENT4, ROUTER4 = "10.77.0.1", "10.77.0.2"
CLIENT6, ROUTER6 = "fd77::1", "fd77::2"
UNREACHABLE4, PROHIBITED4, SILENT4 = "10.99.0.1", "10.98.0.1", "10.97.0.1"
UNREACHABLE6, PROHIBITED6, SILENT6 = "fd99::1", "fd98::1", "fd97::1"
NO_ROUTE4, NO_ROUTE6 = "192.0.2.1", "2001:db8::1"

# Not routes of type "unreachable": what the kernel answers for those is limited in a way that no namespace can change.
_ANSWERS = f"""add table inet t; add chain inet t c {{ type filter hook prerouting priority 0; }};
    add rule inet t c ip daddr {UNREACHABLE4} reject with icmp host-unreachable;
    add rule inet t c ip6 daddr {UNREACHABLE6} reject with icmpv6 addr-unreachable;
    add rule inet t c ip daddr {PROHIBITED4} reject with icmp admin-prohibited;
    add rule inet t c ip6 daddr {PROHIBITED6} reject with icmpv6 admin-prohibited;
    add rule inet t c ip daddr {SILENT4} drop;
    add rule inet t c ip6 daddr {SILENT6} drop"""


class Namespace:
    """A network namespace. `socket` makes sockets that live in it, whoever uses them."""

    def __init__(self, name: str) -> None:
        self.name = name
        run(f"ip netns add {name}")
        self._thread = concurrent.futures.ThreadPoolExecutor(1, initializer=self._enter)

    def socket(self, family: int, type: int) -> socket.socket:
        return self._thread.submit(socket.socket, family, type).result()

    def run(self, command: str) -> None:
        run(f"ip netns exec {self.name} {command}")

    def delete(self) -> None:
        self._thread.shutdown()
        run(f"ip netns del {self.name}")

    def _enter(self) -> None:
        """Move the thread, and with it the sockets that it makes, to the namespace."""
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            if libc.setns(descriptor, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(descriptor)


def run(command: str) -> None:
    output(command)


def output(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def cable() -> Iterator[tuple[Namespace, Namespace]]:
    """(client, router). The router answers with ICMP, or not at all, for the destinations above."""
    with contextlib.ExitStack() as stack:
        client, router = (Namespace(f"ob{os.getpid()}{side}") for side in "cr")
        for namespace in (client, router):
            stack.callback(namespace.delete)
        run(f"ip -n {client.name} link add up0 type veth peer name down0 netns {router.name}")
        for namespace, link, four, six in ((client, "up0", CLIENT4, CLIENT6), (router, "down0", ROUTER4, ROUTER6)):
            run(f"ip -n {namespace.name} link set lo up")
            run(f"ip -n {namespace.name} link set {link} up")
            run(f"ip -n {namespace.name} address add {four}/24 dev {link}")
            run(f"ip -n {namespace.name} address add {six}/64 dev {link} nodad")
        for prefix in ("10.96.0.0/14", "fd90::/12"):
            run(f"ip -n {client.name} route add {prefix} via {ROUTER6 if ':' in prefix else ROUTER4}")
        router.run("sysctl -qw net.ipv4.ip_forward=1")
        router.run("sysctl -qw net.ipv4.icmp_ratelimit=0")
        router.run("sysctl -qw net.ipv6.icmp.ratelimit=0")
        router.run(f"nft {_ANSWERS}")
        yield client, router
