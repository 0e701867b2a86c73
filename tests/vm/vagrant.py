"""The three machines through vagrant/Vagrantfile and libvirt. Run in vagrant/world.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from vm.guest import Guest


class Vagrant:
    """Implements `vm.guest.Machines`."""

    def __init__(self, store: Path, directory: Path) -> None:
        self._store, self._directory = store, directory

    def up(self, gateway: str) -> Mapping[str, Guest]:
        raise NotImplementedError

    def running(self) -> Iterable[Guest]:
        return []

    def consoles(self) -> Iterable[Path]:
        return []

    def close(self) -> None: ...
