"""Kernel settings under /proc/sys/net, remembered so that they can be put back."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/proc/sys/net")


def read(key: str) -> str | None:
    """The value of a key such as "ipv4/conf/all/rp_filter"; None where the kernel does not have it."""
    try:
        return (_ROOT / key).read_text().strip()
    except OSError:
        return None


class Sysctls:
    """Settings changed by us. `restore` puts back what was there, last change first; twice does no harm."""

    def __init__(self) -> None:
        self._before: list[tuple[str, str]] = []

    def set(self, key: str, value: str) -> bool:
        """Set one key. False when the kernel does not have it or does not let us."""
        before = read(key)
        if before is None:
            return False
        if before == value:
            return True
        try:
            (_ROOT / key).write_text(value)
        except OSError:
            return False
        self._before.append((key, before))
        return True

    def keep(self, key: str) -> None:
        """Put this key back too, though something else is going to change it."""
        before = read(key)
        if before is not None:
            self._before.append((key, before))

    def let_go(self, ifname: str, now: str | None) -> None:
        """Put back the settings of one interface, which is called `now` by now; None when it is gone."""
        part = f"/{ifname}/"
        ours = [(key, value) for key, value in self._before if part in key]
        self._before = [(key, value) for key, value in self._before if part not in key]
        if now is not None:
            for key, value in reversed(ours):
                _write(key.replace(part, f"/{now}/"), value)

    def changes(self) -> list[str]:
        """The keys that differ now because of us, with their values: "ipv4.ip_forward = 1"."""
        keys = dict.fromkeys(key for key, _ in self._before)
        return [f"{key.replace('/', '.')} = {read(key)}" for key in keys]

    def describe(self) -> list[dict[str, str | None]]:
        """[{"key", "before", "now"}], keys as sysctl(8) writes them."""
        first = dict(reversed(self._before))  # what was there before our first change
        return [{"key": key.replace("/", "."), "before": first[key], "now": read(key)} for key in reversed(first)]

    def restore(self) -> None:
        while self._before:
            _write(*self._before.pop())


def _write(key: str, value: str) -> None:
    try:
        (_ROOT / key).write_text(value)
    except OSError:
        pass  # its interface is gone, and the setting with it
