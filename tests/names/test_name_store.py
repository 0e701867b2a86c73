"""The sqlite3 store on real files: what survives, and what is said when the file is no good."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

import pytest

from ztun.names.pool import FakeIpPool
from ztun.names.store import SqliteNameStore

RANGES = IPv4Network("198.18.0.0/15"), IPv6Network("2001:2::/48")

ASSIGN_FOR_EVER = """
import sys, time
from ipaddress import IPv4Network, IPv6Network, ip_address
from ztun.names.pool import FakeIpPool
from ztun.names.store import SqliteNameStore
store = SqliteNameStore(sys.argv[1], print)
pool = FakeIpPool(IPv4Network("198.18.0.0/15"), IPv6Network("2001:2::/48"), 8192, 300, store)
for number in range(8192):
    fake = pool.assign(f"host{number}.example", time.monotonic())
    print(f"host{number}.example", ip_address(fake.v4), flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lib" / "ztun" / "fake-ip.db"  # the directory is made when it is not there


@pytest.fixture
def said() -> list[str]:
    return []


def reopened(path: Path, said: list[str]) -> dict[int, str]:
    store = SqliteNameStore(str(path), said.append)
    found = dict(store.load())
    store.close()
    return found


def test_assignments_come_back_least_recently_used_first(path: Path, said: list[str]) -> None:
    store = SqliteNameStore(str(path), said.append)
    assert store.load() == {}
    for slot, name in [(0, "a"), (1, "b"), (2, "c"), (0, "a"), (1, "new")]:
        store.save(slot, name)
    store.close()
    store.close()

    assert list(reopened(path, said).items()) == [(2, "c"), (0, "a"), (1, "new")]
    assert said == []


def test_order_goes_on_after_a_restart(path: Path, said: list[str]) -> None:
    for slot in (0, 1, 0):
        store = SqliteNameStore(str(path), said.append)
        store.save(slot, f"name{slot}")
        store.close()
    assert list(reopened(path, said)) == [1, 0]


def test_every_address_that_was_given_out_survives_kill_9(path: Path, said: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ASSIGN_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    given = [process.stdout.readline() for _ in range(200)]
    process.kill()
    given += process.stdout.read().splitlines()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()

    store = SqliteNameStore(str(path), said.append)
    pool = FakeIpPool(*RANGES, 8192, 300, store)
    for line in given:
        name, address = line.split()
        assert pool.name_of(ip_address(address).packed) == name
    assert said == []
    store.close()


SAVE_FOR_EVER = """
import sys
from ztun.names.store import SqliteNameStore
store = SqliteNameStore(sys.argv[1], print)
serial = int(sys.argv[2])
while True:
    for slot in range(64):
        store.save(slot, f"host{serial}-{slot}.example")
        print(serial, slot, flush=True)
        serial += 1
"""


def test_a_process_that_is_killed_again_and_again_while_it_saves_loses_nothing(path: Path, said: list[str]) -> None:
    """Twenty-five times, at any moment: what was saved is there, and of what was being saved all or nothing."""
    moments = random.Random(1)
    saved: dict[int, int] = {}
    for start in range(0, 25_000_000, 1_000_000):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(path), str(start)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        lines += process.stdout.read().splitlines(keepends=True)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        for line in lines:
            if line.endswith("\n"):
                serial, slot = map(int, line.split())
                saved[slot] = serial
        found = reopened(path, said)
        assert said == []
        assert found.keys() == saved.keys() | found.keys()
        late = {slot for slot, name in found.items() if name != f"host{saved.get(slot)}-{slot}.example"}
        assert len(late) <= 1  # one save was done and not yet told
        assert all(found[slot] == f"host{serial + 1}-{slot}.example" for slot in late)
        saved |= dict.fromkeys(late, serial + 1)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    path = tmp_path / "tiny"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "ztun-test", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_said_once_and_what_found_no_room_is_kept_when_there_is_some(
    tiny: Path, said: list[str]
) -> None:
    path = tiny / "fake-ip.db"
    store = SqliteNameStore(str(path), said.append)
    store.save(0, "before.example")
    ballast = tiny / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    names = {slot: f"{'x' * 60}.host{slot}.example" for slot in range(1, 300)}
    for slot, name in names.items():
        store.save(slot, name)
    assert len(said) == 1
    assert said[0].startswith(f"dns.fake_ip.store: {path}: ")
    assert said[0].endswith("; new Fake-IPs are not kept until this is mended")

    ballast.unlink()
    store.save(300, "after.example")
    store.close()
    assert reopened(path, said) == {0: "before.example", **names, 300: "after.example"}
    assert len(said) == 1


def test_a_disk_that_is_full_from_the_start_leaves_a_pool_that_works(tiny: Path, said: list[str]) -> None:
    with contextlib.suppress(OSError), (tiny / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    store = SqliteNameStore(str(tiny / "fake-ip.db"), said.append)
    pool = FakeIpPool(*RANGES, 100, 300, store)
    fake = pool.assign("www.example", 0.0)
    assert pool.name_of(fake.v4) == "www.example"
    store.close()
    assert len(said) == 1


def test_a_process_killed_on_a_full_disk_keeps_what_was_saved_before(tiny: Path, said: list[str]) -> None:
    path = tiny / "fake-ip.db"
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(path), "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    early = [process.stdout.readline() for _ in range(64)]
    with contextlib.suppress(OSError), (tiny / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    for _ in range(2000):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(early) == 64
    found = reopened(path, said)
    assert found.keys() == set(range(64))
    assert all(re.fullmatch(rf"host\d+-{slot}\.example", name) for slot, name in found.items())
    assert said == []


def damage_noise(path: Path) -> None:
    path.write_bytes(b"this is no database" * 500)


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = b"\xa5" * 4096
    path.write_bytes(content)


def damage_foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()


def damage_later_version(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()


@pytest.mark.parametrize("damage", [damage_noise, damage_middle, damage_foreign, damage_later_version])
def test_unusable_file_is_moved_aside_and_said(path: Path, said: list[str], damage) -> None:
    store = SqliteNameStore(str(path), said.append)
    for slot in range(200):
        store.save(slot, f"name{slot}.example")
    store.close()
    damage(path)
    before = path.read_bytes()

    store = SqliteNameStore(str(path), said.append)
    assert store.load() == {}
    store.save(3, "again")
    store.close()

    assert len(said) == 1
    assert said[0].startswith(f"dns.fake_ip.store: {path} cannot be used: ")
    assert f"moved to {path}.unusable" in said[0]
    assert Path(f"{path}.unusable").read_bytes() == before
    assert reopened(path, said) == {3: "again"}
    assert len(said) == 1


def test_place_where_no_file_can_be_is_said_and_the_store_keeps_nothing(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").touch()
    store = SqliteNameStore(str(tmp_path / "file" / "fake-ip.db"), said.append)
    store.save(0, "a")
    assert store.load() == {}
    store.close()
    assert len(said) == 1
    assert "will not survive a restart" in said[0]


def test_directory_in_the_place_of_the_file_is_left_alone(tmp_path: Path, said: list[str]) -> None:
    store = SqliteNameStore(str(tmp_path), said.append)
    store.save(0, "a")
    store.close()
    assert len(said) == 1
    assert tmp_path.is_dir()


def test_what_cannot_be_written_now_is_written_later(path: Path, said: list[str]) -> None:
    store = SqliteNameStore(str(path), said.append)
    store.save(0, "before")
    shell = sqlite3.connect(path, isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")  # somebody has an sqlite3 shell open, in the middle of a change
    store.save(1, "meanwhile")
    store.save(2, "meanwhile too")
    assert len(said) == 1
    assert "locked" in said[0]
    shell.execute("ROLLBACK")
    shell.close()
    store.save(3, "after")
    store.close()

    assert list(reopened(path, said).items()) == [(0, "before"), (1, "meanwhile"), (2, "meanwhile too"), (3, "after")]
    assert len(said) == 1
