"""The numbers of our routing tables: by them an ip rule is known for that of one instance among others."""

from __future__ import annotations

import zlib
from typing import Any

from ztun.platform.linux import netlink

MAIN = 254
TABLES = 0x7A740000  # to 0x7A74FFFF: the tables of all TUNs


def table_of(device: str) -> int:
    """The number of the routing table of one TUN: the same for each start, another for each name."""
    return TABLES | zlib.crc32(device.encode()) & 0xFFFE


def dns_table_of(device: str) -> int:
    """The table for port 53: everything into the TUN."""
    return table_of(device) + 1


def table_of_rule(rule: Any) -> int:
    """The table that a rule is for: one that looks into the main table has it for a tag, as a group of interfaces that
    nobody is in.
    """
    table = int(netlink.attribute(rule, "FRA_TABLE") or 0)
    return int(netlink.attribute(rule, "FRA_SUPPRESS_IFGROUP") or 0) if table == MAIN else table
