"""The addresses of this host's interfaces."""

from __future__ import annotations

import socket
from typing import Any

from ztun.platform.linux import netlink

# IFA_F_TENTATIVE and IFA_F_DADFAILED, linux/if_addr.h.
_UNUSABLE = 0x40 | 0x08


def interface_addresses() -> list[tuple[str, bytes, int]]:
    """(interface name, packed address, prefix length) for every address in this network namespace."""
    return netlink.run(list_addresses)


def list_addresses(ip: Any, *, tentative: bool = True) -> list[tuple[str, bytes, int]]:
    """The same through an open IPRoute. tentative: also those that cannot be used yet (RFC 4862, section 5.4)."""
    names = {link["index"]: netlink.attribute(link, "IFLA_IFNAME") for link in ip.get_links()}
    found = []
    for message in ip.get_addr():
        if not tentative and (netlink.attribute(message, "IFA_FLAGS") or message["flags"]) & _UNUSABLE:
            continue
        # On a point-to-point link IFA_ADDRESS is the peer's and IFA_LOCAL ours (rtnetlink(7)).
        text = netlink.attribute(message, "IFA_LOCAL") or netlink.attribute(message, "IFA_ADDRESS")
        if text is not None:
            packed = socket.inet_pton(message["family"], text)
            found.append((names.get(message["index"], ""), packed, message["prefixlen"]))
    return found
