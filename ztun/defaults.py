"""What differs between operating systems outside ztun/platform: defaults of the configuration, and a number."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple


class Defaults(NamedTuple):
    """device: tun.name; control: control.socket; names: dns.fake_ip.store; pktinfo: IP_PKTINFO of <netinet/in.h>.

    any_device: the tun.name that takes whichever is free; claims: where files say who has what. None: there is none.
    """

    device: str
    control: Path
    names: Path
    pktinfo: int
    any_device: str | None = None
    claims: Path | None = None


LINUX = Defaults("ztun0", Path("/run/ztun/control.sock"), Path("/var/lib/ztun/fake-ip.db"), 8)
# "utun": the first one that is free. macOS has neither /run nor /var/lib (hier(7)).
DARWIN = Defaults(
    "utun",
    Path("/var/run/ztun/control.sock"),
    Path("/var/db/ztun/fake-ip.db"),
    26,
    any_device="utun",
    claims=Path("/var/run/ztun/claims"),
)

DEFAULTS = DARWIN if sys.platform == "darwin" else LINUX


def control_of(device: str) -> Path:
    """control.socket of an instance whose TUN is called so: the second one on a machine has another, as its files."""
    return DEFAULTS.control if device == DEFAULTS.device else DEFAULTS.control.with_name(f"{device}.sock")


def names_of(device: str) -> Path:
    """dns.fake_ip.store, likewise."""
    return DEFAULTS.names if device == DEFAULTS.device else DEFAULTS.names.with_name(f"{device}.db")
