"""Files and directories: what must be written, and what others must not read."""

from __future__ import annotations

import os
from pathlib import Path

from ztun.config.secrets import check_file
from ztun.doctor.finding import Finding, ok, problem, warning
from ztun.doctor.scene import Scene
from ztun.errors import ConfigError
from ztun.geoip import CountryDatabase
from ztun.platform import facts


def check_secrets(scene: Scene) -> Finding:
    path = scene.config
    if path is None:
        return ok("secrets", "no configuration file")
    try:
        lines = check_file(path, scene.settings)
    except ConfigError as error:
        what, _, remedy = str(error).partition("; ")
        return problem("secrets", what, remedy)
    if lines:
        what, _, remedy = lines[0].partition("; ")
        return warning("secrets", what, remedy)
    return ok("secrets", "others cannot change the configuration file, nor read passwords in it")


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
