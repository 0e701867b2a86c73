"""Who else may read or write the configuration file: it may hold passwords, and it commands who may do much."""

from __future__ import annotations

import stat
from pathlib import Path

from ztun.config.models import Settings
from ztun.errors import ConfigError


def check_file(path: Path, settings: Settings) -> list[str]:
    """Lines of warning about the file that `settings` came from: none, where all is well or it is no ordinary file.

    Raises ConfigError when everybody can write it. A group is left alone: it was made for a purpose.
    """
    try:
        status = path.stat()
    except OSError:
        return []  # it was there a moment ago; /dev/stdin is not to be looked at
    if not stat.S_ISREG(status.st_mode):
        return []
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IWOTH:
        raise ConfigError(f"{path}: everybody can change it (mode {mode:04o}); make it yours alone: chmod 0600 {path}")
    held = [outbound.tag for outbound in settings.outbounds if outbound.password is not None]
    if held and mode & stat.S_IROTH:
        what = "the password" if len(held) == 1 else "passwords"
        tags = ", ".join(held)
        return [f"{path}: everybody can read {what} of {tags} (mode {mode:04o}); chmod 0600 {path}"]
    return []
