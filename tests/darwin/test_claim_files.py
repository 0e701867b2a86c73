"""What instances of one Mac cannot share, claimed by real processes: locked files in the place of abstract names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ztun import lockfiles
from ztun.control import claims
from ztun.control.claims import CONTROL, RANGE, Claim, Claimed, Claims, holders

HOLD = """
import sys
from pathlib import Path
from ztun.control import claims
claims.FILES = Path(sys.argv[1])
held = claims.Claims()
held.acquire([claims.Claim(*pair.split("=", 1), "key", "remedy") for pair in sys.argv[2:]])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run" / "claims"
    monkeypatch.setattr(claims, "FILES", path)
    return path


@contextmanager
def other(directory: Path, *held: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLD, str(directory), *held]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def lan(name: str) -> Claim:
    return Claim("lan", name, "capture.lan", "leave it out of one")


def fake(network: str) -> Claim:
    return Claim(RANGE, network, "dns.fake_ip.range", "give each a range of its own")


def test_who_comes_second_is_told_who_has_it_and_holds_nothing(directory: Path) -> None:
    socket = "/var/run/ztun/control.sock"
    with other(directory, "lan=en0", f"{RANGE}=198.18.0.0/16", f"{CONTROL}={socket}") as first:
        mine, who = Claims(), rf"another ztun \(pid {first.pid}, --socket {socket}\)"
        with pytest.raises(Claimed, match=rf"^capture.lan: en0 is in use by {who}; leave it out of one$"):
            mine.acquire([lan("en1"), lan("en0")])
        assert {one.pid for one in holders()} == {first.pid}
        with pytest.raises(Claimed, match=rf"198.18.0.0/15 overlaps 198.18.0.0/16, which is in use by {who}; give"):
            mine.acquire([fake("198.18.0.0/15")])
        assert len(claims.conflicts([lan("en0"), lan("en1"), fake("198.18.0.0/24")], None)) == 2
        assert claims.conflicts([lan("en0")], first.pid) == []
        mine.acquire([lan("en1"), fake("198.19.0.0/16")])
        assert {one.value for one in holders() if one.pid == os.getpid()} == {"en1", "198.19.0.0/16"}
        mine.release()
        mine.release()
        # However it ends, it has nothing any more.
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert holders() == []
        mine.acquire([lan("en0"), fake("198.18.0.0/16")])
        mine.release()
        assert [path.name for path in directory.iterdir()] == [f"{CONTROL}.%2Fvar%2Frun%2Fztun%2Fcontrol.sock"]


def test_nothing_is_left_at_the_end(directory: Path) -> None:
    mine = Claims()
    mine.acquire([lan("en0"), Claim("dns", "[::1]:53", "dns.listen", "choose another")])
    assert {(one.kind, one.value) for one in holders()} == {("lan", "en0"), ("dns", "[::1]:53")}
    mine.release()
    assert not directory.exists()


def test_odd_files_and_values_harm_nobody(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "nonsense").write_text("?")
    (directory / "lan.en9").symlink_to("/etc/passwd")
    assert holders() == []
    mine = Claims()
    mine.acquire(
        [Claim(CONTROL, "/" + "x" * 300, "control.socket", "choose another path")]
    )  # longer than a name can be
    assert holders() == []
    with pytest.raises(claims.ZtunError, match=r"^capture.lan: cannot claim en9: "):
        mine.acquire([lan("en9")])


def test_who_only_looks_keeps_nobody_from_it(directory: Path) -> None:
    """`ztun doctor` may look at the very moment when an instance starts."""
    mine = Claims()
    mine.acquire([lan("en0")])
    watched = lockfiles.listed(directory)
    assert next(watched) == ("lan", "en0", os.getpid())
    mine.release()
    mine.acquire([lan("en0")])
    assert list(watched) == []
    mine.release()
