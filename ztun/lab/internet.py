"""What makes a host the internet of the laboratory: its addresses, its routes, and what it swallows."""

from __future__ import annotations

from collections.abc import Iterator

from ztun.lab import plan

SYSCTLS = {"ipv6/ip_nonlocal_bind": "1"}
"""Below /proc/sys/net: the IPv6 addresses of `ip_commands` are on no interface, and servers bind to them."""

SILENCE = f"table ip lab {{ chain input {{ type filter hook input priority 0; ip daddr {plan.SILENT4} drop; }}; }}"
"""nft(8) commands: plan.SILENT4 answers nothing."""


def ip_commands() -> Iterator[str]:
    """ip(8) commands. The host answers for the whole internet, and fetches from there under its own address."""
    yield f"route add unreachable {plan.UNREACHABLE4}"
    yield f"route add unreachable {plan.UNREACHABLE6}"
    for address in plan.INTERNET4:
        yield f"address add {address}/32 dev lo"
        yield f"route replace local {address} dev lo table local src {plan.UPSTREAM4}"
    for address in plan.INTERNET6:  # no address on lo: the kernel would add its local route at a time of its own
        yield f"route add local {address} dev lo table local src {plan.UPSTREAM6}"
