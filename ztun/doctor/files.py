"""Files and directories: what must be written, and what others must not read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ztun.doctor.finding import Finding, ok, problem, warning
from ztun.doctor.scene import Scene
from ztun.errors import ConfigError
from ztun.geoip import CountryDatabase
from ztun.platform import facts


def check_secrets(scene: Scene) -> Finding:
    path = scene.config
    tags = [outbound.tag for outbound in scene.settings.outbounds if outbound.password is not None]
    if path is None or not tags:
        return ok("secrets", "no passwords in a file")
    mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        detail = f"{path} has passwords ({', '.join(tags)}) and mode {stat.S_IMODE(mode):04o}"
        return warning("secrets", detail, f"chmod 600 {path}")
    return ok("secrets", f"only its owner reads {path}")


def check_directories(scene: Scene) -> Finding:
    settings = scene.settings
    wanted = [("control.socket", settings.control.socket), ("state files", facts.STATE_DIRECTORY / "x")]
    wanted += [("dns.fake_ip.store", settings.dns.fake_ip.store)] if settings.dns.fake_ip.store is not None else []
    wanted += [("log.file", settings.log.file)] if settings.log.file is not None else []
    refused = [f"{key} in {path.parent}" for key, path in wanted if not _is_writable(path)]
    if refused:
        remedy = "give its user these directories, name others, or run it as root"
        return problem("directories", f"cannot write {', '.join(refused)}", remedy)
    return ok("directories", "store, log, control socket and state files can be written")


def _is_writable(path: Path) -> bool:
    """Whether the file can be made, with the directories that are missing, or written."""
    if path.is_file() and not os.access(path, os.W_OK):
        return False
    there = next((parent for parent in path.parents if parent.exists()), None)
    if there is None or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return False
    return not os.statvfs(there).f_flag & os.ST_RDONLY


def check_geoip(scene: Scene) -> Finding:
    path = scene.settings.route.geoip_database
    if path is None:
        return ok("geoip", "no rule asks for a country")
    try:
        CountryDatabase(path).close()
    except ConfigError as error:
        return problem("geoip", str(error), "get the file, see docs/geoip.md")
    return ok("geoip", f"{path} is a country database")
