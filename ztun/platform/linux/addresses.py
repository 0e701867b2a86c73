"""The addresses of this host's interfaces."""

from __future__ import annotations

import socket

from ztun.platform.linux import netlink


def interface_addresses() -> list[tuple[str, bytes, int]]:
    """(interface name, packed address, prefix length) for every address in this network namespace."""
    return netlink.run(_list)


def _list(ip: object) -> list[tuple[str, bytes, int]]:
    links = ip.get_links()  # type: ignore[attr-defined]
    names = {link["index"]: netlink.attribute(link, "IFLA_IFNAME") for link in links}
    found = []
    for message in ip.get_addr():  # type: ignore[attr-defined]
        # On a point-to-point link IFA_ADDRESS is the peer's and IFA_LOCAL ours (rtnetlink(7)).
        text = netlink.attribute(message, "IFA_LOCAL") or netlink.attribute(message, "IFA_ADDRESS")
        if text is not None:
            packed = socket.inet_pton(message["family"], text)
            found.append((names.get(message["index"], ""), packed, message["prefixlen"]))
    return found
