"""`ztun doctor`: looks at this machine with a configuration in hand, and says what is wrong and what to do about it.

Each check is a function of a Scene that returns a Finding. Nothing on the host is changed.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence

import structlog

from ztun.doctor import conflicts, files, kernel, names, network, proxies, rights
from ztun.doctor.finding import Finding, Level, warning
from ztun.doctor.scene import Scene
from ztun.errors import ZtunError

__all__ = ["CHECKS", "Finding", "Level", "Scene", "examine"]

log = structlog.get_logger("ztun.app")

Check = Callable[[Scene], Finding | Awaitable[Finding]]

# In the order in which they are printed; docs/doctor.md has a row for each.
CHECKS: dict[str, Check] = {
    "capabilities": rights.check_capabilities,
    "compiled": kernel.check_compiled,
    "bcc": kernel.check_bcc,
    "headers": kernel.check_headers,
    "bpf": kernel.check_bpf,
    "tcx": kernel.check_tcx,
    "bpf-jit": kernel.check_jit,
    "xdp": kernel.check_xdp,
    "tun": kernel.check_tun,
    "uso": kernel.check_uso,
    "ipv6": kernel.check_ipv6,
    "open-files": rights.check_open_files,
    "secrets": files.check_secrets,
    "directories": files.check_directories,
    "geoip": files.check_geoip,
    "instance": conflicts.check_instance,
    "leftovers": conflicts.check_leftovers,
    "tun-name": conflicts.check_tun_name,
    "fake-ip": conflicts.check_fake_ip,
    "qdisc": conflicts.check_qdisc,
    "programs": conflicts.check_programs,
    "foreign-xdp": conflicts.check_foreign_xdp,
    "ip-rules": conflicts.check_ip_rules,
    "lan": network.check_lan,
    "forwarding": network.check_forwarding,
    "forward-policy": network.check_forward_policy,
    "rp-filter": network.check_rp_filter,
    "mtu": network.check_mtu,
    "path-mtu": network.check_path_mtu,
    "port-53": conflicts.check_port_53,
    "resolver": names.check_resolver,
    "clients-dns": names.check_clients_dns,
    "dhcp": names.check_dhcp,
    "dns-servers": names.check_dns_servers,
    "proxies": proxies.check_proxies,
}


async def examine(scene: Scene, only: Sequence[str] = ()) -> list[Finding]:
    """The findings of all checks, or of those in `only`, in the order of CHECKS."""
    wanted = [name for name in CHECKS if not only or name in only]
    return list(await asyncio.gather(*(_run(name, scene) for name in wanted)))


async def _run(name: str, scene: Scene) -> Finding:
    try:
        found = CHECKS[name](scene)
        return await found if inspect.isawaitable(found) else found
    except (OSError, ZtunError) as error:
        said = getattr(error, "strerror", None) or str(error)
        return warning(name, f"could not be checked: {said}", "run it as root")
    except Exception as error:
        log.debug("check failed", check=name, exc_info=error)
        return warning(name, f"could not be checked: {error!r}", "run it with --log-level debug, and tell us")
