"""The three machines through vagrant/Vagrantfile and libvirt. Run in vagrant/world.py."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from vm.guest import MACHINES, ROOT, Guest, Reach
from vm.qemu import has_kvm

_LONGEST = 1800  # seconds for `vagrant up`
_OPTION = re.compile(r"^  (\w+) (.+)$", re.MULTILINE)


class Vagrant:
    """Implements `vm.guest.Machines`. store: where the images are; directory: for everything of this run."""

    def __init__(self, store: Path, directory: Path) -> None:
        self._directory = directory
        self._guests: dict[str, Guest] = {}
        self._gateway = ""
        self._environment = {
            **os.environ,
            "VAGRANT_HOME": str(store / "vagrant-home"),
            "VAGRANT_DOTFILE_PATH": str(directory / "vagrant"),
            "VAGRANT_DEFAULT_PROVIDER": "libvirt",
            "ZTUN_VM_DIR": str(store),
            "ZTUN_VM_TCG": "" if has_kvm() else "1",
        }

    def up(self, gateway: str) -> Mapping[str, Guest]:
        if not self._gateway:
            subprocess.run([ROOT / "vagrant" / "libvirt"], check=True)
        elif self._gateway != gateway:
            self._vagrant("destroy", "--force", "gateway")
            self._guests.pop("gateway").forget()
        self._gateway = gateway
        self._environment["ZTUN_VM_GATEWAY_BOX"] = f"ztun-{gateway}"
        self._vagrant("up", "--no-destroy-on-error")
        for name in MACHINES.keys() - self._guests.keys():
            self._guests[name] = Guest(name, self._reach(name), self._directory)
        return dict(self._guests)

    def running(self) -> Iterable[Guest]:
        return list(self._guests.values())

    def consoles(self) -> Iterable[Path]:
        return [self._directory / "vagrant.log"]

    def close(self) -> None:
        for guest in self._guests.values():
            guest.forget()
        self._guests.clear()
        if self._gateway:
            self._vagrant("destroy", "--force")
            self._gateway = ""

    def _vagrant(self, *arguments: str) -> str:
        """What it printed. Raises RuntimeError with the end of it."""
        log = self._directory / "vagrant.log"
        command = ["vagrant", *arguments, "--no-tty"]
        with log.open("a+") as output:
            before = output.seek(0, os.SEEK_END)
            done = subprocess.run(
                command, cwd=ROOT / "vagrant", env=self._environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, timeout=_LONGEST, check=False,
            )  # fmt: skip
            output.seek(before)
            said = output.read()
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` gave {done.returncode}: {said[-3000:]}")
        return said

    def _reach(self, name: str) -> Reach:
        options = dict(_OPTION.findall(self._vagrant("ssh-config", name)))
        return Reach(options["HostName"], int(options["Port"]), options["User"], Path(options["IdentityFile"]))
