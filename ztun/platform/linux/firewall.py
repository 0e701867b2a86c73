"""Firewall chains that drop what is forwarded unless a rule accepts it, as Docker sets them up. They are only read.

With BPF nothing of ours is forwarded. Without, clients' packets and the replies are, and a drop is final whatever
another chain says (nft(8)): nobody but the chain's owner can let them pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.main import NFTables

_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}  # NFPROTO_*, linux/netfilter.h
_FORWARD = 2  # NF_INET_FORWARD
_DROP = 0  # NF_DROP


def find_forward_drops(device: str) -> list[str]:
    """Those with no rule that names `device`, as "ip filter FORWARD". None are found of iptables-legacy."""
    found: list[str] = []
    # pyroute2 runs an event loop of its own, which a thread with another does not let it.
    thread = threading.Thread(target=lambda: found.extend(_find(device)), name="ztun-netlink")
    thread.start()
    thread.join()
    return found


def remedy(chains: Iterable[str], device: str) -> str:
    """The commands of nft(8) that let pass what concerns `device`."""
    rules = [f'nft insert rule {chain} {side} "{device}" accept' for chain in chains for side in ("iifname", "oifname")]
    return "; ".join(rules)


def _find(device: str) -> list[str]:
    try:
        with NFTables(nfgen_family=0) as nft:
            chains = [_name(one, "NFTA_CHAIN") for one in nft.get_chains() if _is_forward_drop(one)]
            naming = {_name(one, "NFTA_RULE") for one in nft.get_rules() if device in str(one)} if chains else set()
    except (NetlinkError, OSError):
        return []  # no nftables in this kernel, or we may not look
    return [" ".join(chain) for chain in chains if chain not in naming]


def _name(message: Any, prefix: str) -> tuple[str, ...]:
    own = "NAME" if prefix == "NFTA_CHAIN" else "CHAIN"
    family = _FAMILIES.get(message["nfgen_family"], "?")
    return family, message.get_attr(f"{prefix}_TABLE"), message.get_attr(f"{prefix}_{own}")


def _is_forward_drop(chain: Any) -> bool:
    hook = chain.get_attr("NFTA_CHAIN_HOOK")
    if hook is None or chain["nfgen_family"] not in _FAMILIES:
        return False
    number, policy = hook.get_attr("NFTA_HOOK_HOOKNUM"), chain.get_attr("NFTA_CHAIN_POLICY")
    return bool(number == _FORWARD and policy == _DROP)
