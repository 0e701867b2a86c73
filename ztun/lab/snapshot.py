"""What the network of a namespace looks like, as text to compare before and after."""

from __future__ import annotations

import re

from ztun.lab.namespace import Namespace

_COMMANDS = (
    "ip -d address",
    "ip -d link",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "ip -4 rule",
    "ip -6 rule",
    "ip neighbour show proxy",
    "tc qdisc show",
    "nft list ruleset",
    "bpftool net show",
    "sysctl -a --pattern ^net",
)
# Values that move on their own: expiry times, timers, counters, memory of the neighbour and fib garbage collectors.
_RESTLESS = re.compile(
    r" expires \S+| \w+_timer +[\d.]+|conntrack_count = \d+|^net\.ipv6\.conf\.\S+\.(stable_secret|temp\S+) = .*$",
    re.MULTILINE,
)


def snapshot(namespace: Namespace) -> dict[str, str]:
    """Command -> its output. Equal snapshots mean that nothing of what they show was left behind."""
    taken = {line: _read(namespace, line) for line in _COMMANDS}
    for ifname in re.findall(r"^\d+: ([^:@]+)", taken["ip -d link"], re.MULTILINE):
        for hook in ("ingress", "egress"):
            line = f"tc filter show dev {ifname} {hook}"
            taken[line] = _read(namespace, line)
    return taken


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The lines that are in one snapshot only, each with its command and a sign."""
    found = []
    for line in sorted(before.keys() | after.keys()):
        old, new = before.get(line, "").splitlines(), after.get(line, "").splitlines()
        found += [f"{line}: - {text}" for text in old if text not in new]
        found += [f"{line}: + {text}" for text in new if text not in old]
    return found


def _read(namespace: Namespace, line: str) -> str:
    return _RESTLESS.sub("", namespace.run(*line.split(), check=False).stdout)
