"""A real systemd as the first process of namespaces of its own, with our unit and a few targets that it is ordered by.

It sees this file system read-only, with a /run, /etc, /dev, /var, /tmp and units of its own, and a cgroup of its own as
the root. Nothing of it is left once its first process has ended.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ztun.lab import Lab
from ztun.lab.namespace import run, wait_until

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "packaging" / "ztun.service"
_BOOT = 30.0  # seconds

# $1: a directory of this world, $2: the name of a cgroup, $3: the checkout, $4: the prefix of its Python.
_INIT = r"""
set -e
if [ "$5" != inside ]; then
    mount --make-rprivate /
    mount -t proc proc /proc
    mount -t cgroup2 cgroup2 "$1/cgroup"
    mkdir "$1/cgroup/$2"
    echo $$ > "$1/cgroup/$2/cgroup.procs"
    umount "$1/cgroup"
    exec unshare --cgroup sh "$0" "$1" "$2" "$3" "$4" inside
fi
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup

mount -t tmpfs -o mode=755 tmpfs "$1/new"
cd "$1/new"
mkdir -p run/world run/source run/python etc dev/net dev/shm dev/pts var/lib var/log var/tmp var/cache tmp units bin
chmod 1777 tmp var/tmp
mount --bind "$1" run/world
mount --bind "$3" run/source
mount --bind "$4" run/python
cp -a /etc/. etc/
rm -rf etc/systemd/system etc/ztun
mkdir -p etc/systemd/system/ztun.service.d etc/ztun
cp "$1/config.json" etc/ztun/
chmod 600 etc/ztun/config.json
cp "$3/packaging/ztun.service" etc/systemd/system/
cp "$1/drop-in.conf" etc/systemd/system/ztun.service.d/
for device in null zero full random urandom tty; do cp -a "/dev/$device" dev/; done
mknod -m 666 dev/net/tun c 10 200
ln -s /proc/self/fd dev/fd
for name in sysinit basic network-online nss-lookup world; do
    printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' "$name" > "units/$name.target"
done
printf '[Unit]\nDescription=shutdown\nDefaultDependencies=no\nRefuseManualStart=yes\n' > units/shutdown.target
cat > bin/ztun <<'END'
#!/bin/sh
export PYTHONPATH=/run/source PYTHONDONTWRITEBYTECODE=1
exec /run/python/bin/python3 -c 'import sys; from ztun.cli import main; sys.exit(main())' "$@"
END
chmod 755 bin/ztun

for place in etc dev var tmp; do mount --bind "$place" "/$place"; done
mount --bind units /usr/lib/systemd/system
mount --bind bin /usr/local/bin
for place in /usr/lib/systemd/system-generators /usr/lib/systemd/system-environment-generators; do
    [ ! -d $place ] || mount -t tmpfs tmpfs $place
done
mount -o remount,bind,ro /
mount --rbind run /run
mount --make-rshared /
cd /
export container=ztun-test
exec /usr/lib/systemd/systemd --system --unit=world.target --log-target=console --log-level=info --show-status=no
"""


class Systemd:
    """Use `booted`. directory: holds unit.log and systemd.log, and is /run/world inside."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self._cgroup = f"ztun-test-{os.getpid()}-{directory.name}"
        self._process: subprocess.Popen[Any] | None = None
        self._init = 0

    @property
    def output(self) -> str:
        """What the unit printed, and what systemd said of it."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.directory.glob("*.log")))

    def run(self, *argv: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A program inside, as root."""
        return run(
            ["nsenter", "-t", str(self._init), "-m", "-p", "-n", "-r", "-w", *argv], check=check, timeout=timeout
        )

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """What systemctl(1) printed."""
        done = self.run("systemctl", "--no-pager", *arguments, check=check)
        return (done.stdout + done.stderr).strip()

    def show(self, name: str) -> str:
        """A property of the unit."""
        return self.systemctl("show", "ztun.service", f"--property={name}", "--value")

    def pid(self) -> int:
        """The unit's main process, in our own numbers."""
        inner = self.show("MainPID")
        for path in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError, StopIteration):
                numbers = next(line for line in path.read_text().splitlines() if line.startswith("NSpid:")).split()[1:]
                if numbers[1:] == [inner] and self._is_inside(path.parent):
                    return int(numbers[0])
        raise RuntimeError(f"the unit has no process {inner}: {self.output}")

    def _is_inside(self, process: Path) -> bool:
        return os.readlink(process / "ns/pid") == os.readlink(f"/proc/{self._init}/ns/pid")

    def boot(self, config: str, settings: Sequence[str] = ()) -> None:
        """Start systemd, and not yet the unit. settings: lines of section Service over those of the file."""
        for place in ("cgroup", "new"):
            (self.directory / place).mkdir(parents=True)
        (self.directory / "config.json").write_text(config)
        lines = ["[Service]", "StandardOutput=append:/run/world/unit.log", "StandardError=inherit", *settings]
        (self.directory / "drop-in.conf").write_text("\n".join(lines) + "\n")
        script = self.directory / "init.sh"
        script.write_text(_INIT)
        arguments = (str(self.directory), self._cgroup, str(ROOT), sys.prefix)
        with (self.directory / "systemd.log").open("wb") as log:
            self._process = self.lab.gateway.spawn(
                *("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"),
                *("sh", str(script), *arguments),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if not wait_until(self._is_up, _BOOT):
            raise RuntimeError(f"systemd does not come up: {self.output}")

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"systemd ended: {self.output}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return False
        self._init = int(children[0])
        done = self.run("systemctl", "is-system-running", check=False, timeout=10)
        return done.stdout.strip() in ("running", "degraded")

    def close(self) -> None:
        """End it with all that runs in it, and remove its cgroups."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        tidy = (
            'mount -t cgroup2 cgroup2 "$0/cgroup" && [ ! -d "$0/cgroup/$1" ] || '
            'find "$0/cgroup/$1" -depth -type d -exec rmdir {} +'
        )
        argv = ["unshare", "--mount", "sh", "-c", tidy, str(self.directory), self._cgroup]
        wait_until(lambda: run(argv, check=False).returncode == 0)


@contextlib.contextmanager
def booted(lab: Lab, name: str, config: str, settings: Sequence[str] = ()) -> Iterator[Systemd]:
    """A systemd in the lab's gateway, which goes with the context."""
    world = Systemd(lab, lab.directory / name)
    try:
        world.boot(config, settings)
        yield world
    finally:
        world.close()
