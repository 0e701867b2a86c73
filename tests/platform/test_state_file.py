"""What a killed instance changed is found in its state file and put back: by the next one, or by `ztun down`."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from lan_world import World
from structlog.testing import capture_logs

from ztun.errors import ZtunError
from ztun.platform.linux import hooks, journal, netlink, sysctl
from ztun.platform.linux.aftermath import find_leftovers, recover, sweep
from ztun.platform.linux.journal import Change, Journal
from ztun.platform.linux.sysctl import Sysctls

U32 = ("u32", "match", "u32", "0", "0")
FILTER4 = "ipv4/conf/lan0/rp_filter"
FORWARDING4 = "ipv4/conf/lan0/forwarding"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def journals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this process: none yet."""
    monkeypatch.setattr(journal, "_of_this_process", {})


def write(key: str, value: str) -> None:
    Path("/proc/sys/net", key).write_text(value)


def die(one: Journal) -> None:
    """What SIGKILL does to a journal: its descriptor is closed, and with it goes the lock."""
    os.close(one._fd)
    one._path = None


def killed(device: str = "ztun0", **settings: str) -> Journal:
    """A dead instance that set sysctls of lan0."""
    one = Journal(device)
    one.open()
    changes = Sysctls(one)
    for key, value in settings.items():
        assert changes.set(f"ipv4/conf/lan0/{key}", value)
    die(one)
    return one


def test_the_file_says_what_is_about_to_be_done(world: World, directory: Path) -> None:
    one = Journal("ztun0")
    one.open(["/run/x/control.sock"])
    Sysctls(one).set(FILTER4, "2")
    one.add_qdisc(7, "lan9")
    (path,) = directory.iterdir()
    said = json.loads(path.read_text())
    assert path.name == f"ztun0-{journal.network_namespace()}.state"
    assert said["sysctls"] == [[FILTER4, "0", "2", socket.if_nametoindex("lan0")]]
    assert said["qdiscs"] == {"7": "lan9"}
    assert (said["pid"], said["boot"], said["files"]) == (os.getpid(), journal.boot_id(), ["/run/x/control.sock"])
    assert said["started"] == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    one.discard([Change(*said["sysctls"][0])])
    one.discard_qdisc(7)
    one.close()
    assert not directory.exists()


def test_the_next_one_puts_back_what_was_there_before_the_first(world: World) -> None:
    killed(rp_filter="2", forwarding="1")
    one = journal.of("ztun0")
    one.open()
    assert recover("ztun0") == [
        "sysctl ipv4.conf.lan0.rp_filter, now 0 again",
        "sysctl ipv4.conf.lan0.forwarding, now 0 again",
    ]
    again = Sysctls(one)
    again.set(FORWARDING4, "1")  # takes nothing changed for an original
    again.restore()
    assert (sysctl.read(FORWARDING4), sysctl.read(FILTER4)) == ("0", "0")
    one.close()


def test_without_a_next_one_the_sweep_does_it_and_says_so(world: World, directory: Path) -> None:
    killed(rp_filter="2")
    (path,) = directory.iterdir()
    lines = ["sysctl ipv4.conf.lan0.rp_filter, which was 0", f"state file {path}"]
    assert find_leftovers() == lines
    assert sysctl.read(FILTER4) == "2"  # to look changes nothing
    assert sweep() == lines
    assert sysctl.read(FILTER4) == "0"
    assert find_leftovers() == sweep() == []
    assert not directory.exists()


def test_one_of_another_name_sweeps_too_and_leaves_the_living_alone(world: World) -> None:
    living = Journal("zt2")
    living.open()
    Sysctls(living).set("ipv4/conf/wan0/rp_filter", "2")
    killed("zt1", rp_filter="2")
    journal.of("ztun0").open()
    assert [line for line in recover("ztun0") if "sysctl" in line] == ["sysctl ipv4.conf.lan0.rp_filter, which was 0"]
    assert find_leftovers() == sweep("ztun0") == []
    assert (sysctl.read(FILTER4), sysctl.read("ipv4/conf/wan0/rp_filter")) == ("0", "2")
    journal.of("ztun0").close()
    die(living)
    assert sweep() != []
    assert sysctl.read("ipv4/conf/wan0/rp_filter") == "0"


def test_somebody_who_looks_does_not_keep_it_from_being_swept(world: World, directory: Path) -> None:
    killed(rp_filter="2")
    (path,) = directory.iterdir()
    with path.open() as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        threading.Timer(0.03, lambda: fcntl.flock(looker, fcntl.LOCK_UN)).start()
        sweep()
    assert sysctl.read(FILTER4) == "0"
    assert not path.exists()


def test_two_of_one_name_are_refused(world: World) -> None:
    one = Journal("ztun0")
    one.open()
    with pytest.raises(ZtunError, match=r"another ztun has tun\.name ztun0: stop it with `ztun down`"):
        Journal("ztun0").open()
    one.close()
    two = Journal("ztun0")
    two.open()
    two.close()


def test_what_somebody_else_changed_since_stays(world: World) -> None:
    killed(rp_filter="2", forwarding="1")
    write(FILTER4, "1")
    with capture_logs() as logs:
        sweep()
    assert (sysctl.read(FILTER4), sysctl.read(FORWARDING4)) == ("1", "0")
    (told,) = logs
    assert (told["sysctl"], told["value"]) == ("ipv4.conf.lan0.rp_filter", "1")


def test_an_end_in_peace_leaves_somebody_elses_value_too(world: World) -> None:
    settings = Sysctls(Journal("ztun0"))
    settings.set(FILTER4, "2")
    write(FILTER4, "1")
    settings.restore()
    assert sysctl.read(FILTER4) == "1"


def test_a_renamed_interface_gets_its_value_back(world: World) -> None:
    killed(rp_filter="2")
    world.gateway.ip("link set lan0 down", "link set lan0 name lan9", "link set lan9 up")
    assert sweep()[0] == "sysctl ipv4.conf.lan9.rp_filter, which was 0"
    assert sysctl.read("ipv4/conf/lan9/rp_filter") == "0"


def test_an_interface_made_anew_under_the_name_is_another(world: World) -> None:
    killed(rp_filter="2")
    world.gateway.ip("link del lan0", "link add lan0 type veth peer name lan0p")
    write(FILTER4, "2")
    assert [line for line in sweep() if "sysctl" in line] == []
    assert sysctl.read(FILTER4) == "2"


def test_after_a_boot_nothing_is_put_back(world: World, directory: Path) -> None:
    killed(rp_filter="2")
    (path,) = directory.iterdir()
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "boot": "another"}))
    assert find_leftovers() == [f"state file {path}, of an earlier boot"]
    journal.of("ztun0").open()
    assert [line for line in recover("ztun0") if "sysctl" in line] == []
    journal.of("ztun0").close()
    assert sysctl.read(FILTER4) == "2"
    assert not path.exists()


def test_another_network_namespace_is_not_this_ones_business(world: World, directory: Path) -> None:
    killed(rp_filter="2")
    with world.server.entered():
        assert find_leftovers() == sweep() == []
    assert len(list(directory.iterdir())) == 1
    assert sweep() != []


@pytest.mark.parametrize(
    "content",
    [
        b"\0\1\2 not JSON",
        b'{"version": 1, "device": "ztun0", "sysctls": [["ipv4/conf/la',
        b'{"version": 99}',
        b"[]",
        b"17",
        b'{"version": 1, "device": "ztun0", "sysctls": [["../../kernel/panic", "0", "1", 0]]}',
        b'{"version": 1, "device": "ztun0", "sysctls": [["ipv4/conf/../../core/x", "0", "1", 0]]}',
        b'{"version": 1, "device": "ztun0", "surprise": 1}',
    ],
)
def test_a_file_that_is_none_of_ours_is_said_and_left_alone(world: World, directory: Path, content: bytes) -> None:
    directory.mkdir()
    path = directory / "other-1.state"
    path.write_bytes(content)
    with capture_logs() as logs:
        assert sweep() == []
    assert path.read_bytes() == content
    assert [entry["file"] for entry in logs] == [str(path)]
    # In our own place it makes room.
    own = journal.path_of("ztun0", journal.network_namespace())
    path.rename(own)
    one = Journal("ztun0")
    with capture_logs() as logs:
        assert one.open() is None
    assert json.loads(own.read_text())["pid"] == os.getpid()
    one.close()
    assert not own.exists()


def test_killed_before_the_first_word(world: World, directory: Path) -> None:
    directory.mkdir()
    (directory / "zt1-5.state").touch()
    (directory / "zt1-5.state.new").touch()
    assert sweep() == [f"state file {directory}/zt1-5.state, of an earlier boot"]
    assert list(directory.iterdir()) == []


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_where_nothing_can_be_written_that_is_said_once(world: World, directory: Path) -> None:
    with mounted(directory, "ro"), capture_logs() as logs:
        one = Journal("ztun0")
        one.open()
        settings = Sysctls(one)
        settings.set(FILTER4, "2")
        settings.set(FORWARDING4, "1")
        settings.restore()
        one.close()
    assert (sysctl.read(FILTER4), sysctl.read(FORWARDING4)) == ("0", "0")
    (told,) = logs
    assert told["event"] == "no state file: what is changed now is not put back should ztun be killed"
    assert told["reason"] == "read-only file system"


def test_a_disk_that_is_full_meanwhile_keeps_what_was_written(world: World, directory: Path) -> None:
    with mounted(directory, "size=16k"), capture_logs() as logs:
        one = Journal("ztun0")
        one.open()
        settings = Sysctls(one)
        settings.set(FILTER4, "2")
        fill(directory / "filler")
        settings.set(FORWARDING4, "1")
        settings.set("ipv4/conf/wan0/forwarding", "1")
        die(one)
        assert [line for line in sweep() if "sysctl" in line] == ["sysctl ipv4.conf.lan0.rp_filter, which was 0"]
        assert [path.name for path in directory.iterdir()] == ["filler"]
    assert [entry["reason"] for entry in logs] == ["no space left on device"]


def test_a_qdisc_that_was_made_without_a_filter_yet_goes(world: World) -> None:
    """Killed between the two; a filter would have told whose it is."""
    index = socket.if_nametoindex("lan0")
    for is_used in (False, True):
        one = Journal("ztun0")
        one.open()
        one.add_qdisc(index, "lan0")
        world.gateway.run("tc", "qdisc", "add", "dev", "lan0", "clsact")
        die(one)
        if is_used:
            world.gateway.run("tc", "filter", "add", "dev", "lan0", "egress", "prio", "5", *U32)
        assert ("clsact qdisc on lan0" in sweep()) == (not is_used)
        assert netlink.run(lambda ip: hooks.has_clsact(ip, index)) == is_used


def test_files_of_a_dead_instance_go_and_those_of_a_living_one_stay(world: World, tmp_path: Path) -> None:
    dead, living = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    for sock, name in ((dead, "dead.sock"), (living, "living.sock")):
        sock.bind(str(tmp_path / name))
        sock.listen()
    dead.close()
    (tmp_path / "dead.sock.lock").touch()
    (tmp_path / "precious").touch()
    one = Journal("ztun0")
    one.open([tmp_path / name for name in ("dead.sock", "living.sock", "dead.sock.lock", "precious", "absent")])
    die(one)
    assert [line for line in sweep() if line.startswith("file")] == [
        f"file {tmp_path}/dead.sock",
        f"file {tmp_path}/dead.sock.lock",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living.sock", "precious"]
    living.close()


def test_half_an_undoing_is_finished(world: World) -> None:
    """ipv6/conf/all/forwarding is written first, and with it that of each interface: then comes SIGKILL."""
    write("ipv6/conf/lan0/forwarding", "1")
    one = Journal("ztun0")
    one.open()
    settings = Sysctls(one)
    for ifname in ("lan0", "wan0"):
        settings.keep(f"ipv6/conf/{ifname}/forwarding", becomes="1")
    settings.set("ipv6/conf/all/forwarding", "1")
    write("ipv6/conf/all/forwarding", "0")
    assert sysctl.read("ipv6/conf/lan0/forwarding") == "0"
    die(one)
    sweep()
    assert [sysctl.read(f"ipv6/conf/{name}/forwarding") for name in ("all", "lan0", "wan0")] == ["0", "1", "0"]


def test_of_a_users_own_state_file_only_files_beside_it_are_believed(world: World, directory: Path) -> None:
    """A service with a user of its own cannot have root's sweep remove what it could not remove itself."""
    one = Journal("ztun0")
    beside, elsewhere = directory / "ztun0.sock", directory.parent / "somebody.sock"
    one.open([beside, elsewhere])
    die(one)
    for path in (beside, elsewhere):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    [file] = directory.glob("*.state")
    os.chown(directory, 4711, -1)
    os.chown(file, 4711, -1)
    sweep("ztun0")
    assert elsewhere.exists()
    assert not beside.exists()
