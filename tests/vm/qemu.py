"""The three machines with plain qemu: overlays of the local images, taps on bridges. Run in vagrant/world.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vm.guest import BOOT, MACHINES, Guest, Reach, at_once, sources

_FIRST_PORT = 2201  # on the loopback of the world's own network namespace
_NETWORKS = ("ztun-lan", "ztun-wan")
_CPUS = {"gateway": 2}
_KVM = ["-accel", "kvm", "-cpu", "host"]
# The model that boots fastest. Without cmpxchg16b, which qemu 7.2 emulates with wrong flags now and then: Linux 6.12
# panics of it.
_TCG = ["-accel", "tcg,thread=multi", "-cpu", "Nehalem,-cx16"]


def has_kvm() -> bool:
    """Whether there is hardware virtualisation. A /dev/kvm alone does not mean that."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return bool({"vmx", "svm"} & flags) and os.access("/dev/kvm", os.R_OK | os.W_OK) and not os.getenv("ZTUN_VM_TCG")


class Qemu:
    """Implements `vm.guest.Machines`. store: where the images are; directory: for overlays and logs."""

    def __init__(self, store: Path, directory: Path) -> None:
        self._store, self._directory = store, directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._guests: dict[str, Guest] = {}
        self._image = ""

    def up(self, gateway: str) -> Mapping[str, Guest]:
        if not self._guests:
            for network in _NETWORKS:
                _ip(f"link add {network} type bridge mcast_snooping 0", f"link set {network} up")
        images = {"client": "bookworm", "upstream": "bookworm", "gateway": gateway}
        if self._image != gateway:
            self._end("gateway")
            self._image = gateway
        wanted = [name for name in MACHINES if name not in self._processes]
        for name in wanted:
            self._start(name, self._store / f"{images[name]}.qcow2")
        packed = sources()
        at_once(*(partial(self._provision, self._guests[name], packed) for name in wanted))
        return dict(self._guests)

    def running(self) -> Iterable[Guest]:
        return [self._guests[name] for name in self._processes]

    def consoles(self) -> Iterable[Path]:
        return self._directory.glob("*.console")

    def close(self) -> None:
        for name in list(self._processes):
            self._end(name)

    def _start(self, name: str, image: Path) -> None:
        disk = self._directory / f"{name}.qcow2"
        disk.unlink(missing_ok=True)
        _run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), str(disk)])
        port = _FIRST_PORT + list(MACHINES).index(name)
        argv = [
            "qemu-system-x86_64", *(_KVM if has_kvm() else _TCG), "-machine", "pc", "-nodefaults", "-no-user-config",
            "-display", "none", "-m", str(MACHINES[name]["memory"]), "-smp", str(_CPUS.get(name, 1)),
            "-drive", f"file={disk},if=virtio,cache=unsafe,discard=unmap",
            "-device", "virtio-rng-pci", "-serial", f"file:{self._directory / name}.console",
            "-netdev", f"user,id=management,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22",
            "-device", "virtio-net-pci,netdev=management,romfile=",
            *self._links(name),
        ]  # fmt: skip
        # Not of our process group: after Ctrl-C the machines are still there to take logs from.
        self._processes[name] = subprocess.Popen(argv, process_group=0, stdin=subprocess.DEVNULL)
        self._guests[name] = Guest(name, Reach("127.0.0.1", port, "vagrant", self._store / "key"), self._directory)

    def _links(self, name: str) -> list[str]:
        options: list[str] = []
        for number, link in enumerate(MACHINES[name]["links"]):
            tap = f"{name}-{link['name']}"
            _ip(f"tuntap add {tap} mode tap vnet_hdr", f"link set {tap} master {link['network']} up")
            options += ["-netdev", f"tap,id=link{number},ifname={tap},script=no,downscript=no"]
            options += ["-device", f"virtio-net-pci,netdev=link{number},mac={link['mac']},romfile="]
        return options

    def _end(self, name: str) -> None:
        if (process := self._processes.pop(name, None)) is None:
            return
        self._guests[name].forget()
        process.kill()
        process.wait()
        for link in MACHINES[name]["links"]:
            _ip(f"link del {name}-{link['name']}")

    def _provision(self, guest: Guest, packed: bytes) -> None:
        guest.wait()
        guest.run("mkdir -p /ztun && tar -x -C /ztun", stdin=packed)
        for wheel in (self._store / "wheel").glob("*.whl"):
            guest.run(f"mkdir -p /ztun-wheel && cat > /ztun-wheel/{wheel.name}", stdin=wheel.read_bytes())
        guest.run(f"/ztun/vagrant/provision/{guest.name}.sh", timeout=BOOT)


def _ip(*commands: str) -> None:
    _run(["ip", "-batch", "-"], input="\n".join(commands), text=True)


def _run(argv: Sequence[str], **options: Any) -> None:
    done = subprocess.run(argv, capture_output=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(argv)}` gave {done.returncode}: {done.stdout!r}{done.stderr!r}")
