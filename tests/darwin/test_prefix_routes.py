"""Which prefixes become routes into the utun, and what is done when that cannot be."""

from __future__ import annotations

import asyncio
import os
import plistlib
import random
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from darwin.test_resolver_files import dead_pid
from ztun.errors import ConfigError, ZtunError
from ztun.platform import darwin
from ztun.platform.darwin.calls import Done
from ztun.platform.darwin.forwarding import Forwarding, left_over, sweep
from ztun.platform.darwin.routes import PrefixRoutes, show
from ztun.platform.darwin.table import PrefixTable, halves, outermost
from ztun.ports import Prefix, Verdict

ROOT = Path(__file__).resolve().parents[2]
A, B, C = ((bytes((192, 0, number, 0)), 24) for number in (1, 2, 3))


class Recorded:
    """Programs whose answers are given: what route(8), ifconfig(8) and sysctl(8) say by their manuals and sources."""

    def __init__(self, **answers: Done) -> None:
        self.ran: list[str] = []
        self._answers = answers

    def run(self, argv: Sequence[str]) -> Done:
        line = " ".join(argv)
        self.ran.append(line)
        return next((done for key, done in self._answers.items() if key.replace("_", " ") in line), Done(0, ""))

    def dump(self, what: int, argument: int = 0) -> bytes:
        return b""


def longest(prefixes: list[Prefix], address: bytes) -> Prefix | None:
    value = int.from_bytes(address)
    shift = len(address) * 8
    matching = [
        one for one in prefixes if value >> shift - one.length == int.from_bytes(one.network) >> shift - one.length
    ]
    return max(matching, key=lambda one: one.length, default=None)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_the_table_against_a_naive_longest_match(size: int, seed: int) -> None:
    random_ = random.Random(seed)
    found: dict[tuple[bytes, int], Prefix] = {}
    for _ in range(120):
        length = random_.choice([0, 1, 7, 8, 9, size * 8 - 1, size * 8])
        value = int.from_bytes(random_.choice([b"\x20", b"\x21", b"\xff"]) * size)
        network = (value >> size * 8 - length << size * 8 - length).to_bytes(size)
        found[network, length] = Prefix(network, length, random_.choice(list(Verdict)), random_.randrange(9))
    prefixes = list(found.values())
    table = PrefixTable(size)
    table.replace(prefixes)
    edges = [(int.from_bytes(one.network), 1 << size * 8 - one.length) for one in prefixes]
    near = [value for first, span in edges for value in (first - 1, first, first + span - 1, first + span)]
    for value in [*near, *(random_.getrandbits(size * 8) for _ in range(200))]:
        address = (value % (1 << size * 8)).to_bytes(size)
        match, entry = longest(prefixes, address), table.find(address)
        assert (match is None) == (entry is None)
        if match is not None and entry is not None:
            assert (entry.verdict, entry.rule) == (match.verdict, match.rule)
    # All that is not direct is routed, by prefixes that do not lie in each other.
    routed = outermost(prefixes)
    for one in prefixes:
        covering = [Prefix(*key, Verdict.DROP, 0) for key in routed if key[1] <= one.length]
        inside = [each for each in covering if longest([each], one.network)]
        assert len(inside) <= 1
        if one.verdict is not Verdict.DIRECT:
            assert inside


def test_the_systems_default_route_stays() -> None:
    assert [show(key) for key in halves((bytes(4), 0))] == ["0.0.0.0/1", "128.0.0.0/1"]
    assert [show(key) for key in halves((bytes(16), 0))] == ["::/1", "8000::/1"]
    assert halves(A) == [A]


def test_only_differences_are_written() -> None:
    calls = Recorded()
    routes = PrefixRoutes("utun7", calls)  # type: ignore[arg-type]
    routes.replace([A, B])
    routes.replace([B, C, B])
    routes.replace([])
    assert calls.ran == [
        "route -n add -inet -net 192.0.1.0/24 -interface utun7",
        "route -n add -inet -net 192.0.2.0/24 -interface utun7",
        "route -n add -inet -net 192.0.3.0/24 -interface utun7",
        "route -n delete -inet -net 192.0.1.0/24 -interface utun7",
        "route -n delete -inet -net 192.0.2.0/24 -interface utun7",
        "route -n delete -inet -net 192.0.3.0/24 -interface utun7",
    ]


@pytest.mark.parametrize(
    "said",
    [
        Done(77, "route: must be root to alter routing table"),
        Done(0, "writing to routing socket: Network is unreachable"),  # which route(8) may call a success
        Done(68, "route: bad address: utun7"),
    ],
)
def test_what_was_added_before_a_refusal_is_taken_back(said: Done) -> None:
    calls = Recorded(**{"add_-inet_-net_192.0.2.0": said})
    routes = PrefixRoutes("utun7", calls)  # type: ignore[arg-type]
    with pytest.raises(ZtunError) as refused:
        routes.replace([A, B, C])
    assert str(refused.value) == f"cannot route 192.0.2.0/24 into utun7: {said.output}"
    assert calls.ran[2:] == ["route -n delete -inet -net 192.0.1.0/24 -interface utun7"]
    assert routes.installed == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "tcx", "fail": "open"}, "capture.backend: there is no tcx on macOS; set it to auto"),
        ({"backend": "auto", "fail": "closed"}, "capture.fail: on macOS .*; set it to open"),
    ],
)
def test_what_macos_cannot_do_is_a_mistake_in_the_configuration(options: dict[str, str], words: str) -> None:
    backend, fail = options["backend"], options["fail"]
    making = darwin.make_classifier(backend, "utun7", [], mark=0, hijack_dns=True, fail=fail, own_addresses=[])
    with pytest.raises(ConfigError, match=words):
        asyncio.run(making)


# Forwarding.


def test_forwarding_is_put_back_as_it_was(tmp_path: Path) -> None:
    calls = Recorded(**{"-n_net.inet.ip.forwarding": Done(0, "0"), "-n_net.inet6.ip6.forwarding": Done(0, "1")})
    forwarding = Forwarding("utun7", calls, tmp_path)  # type: ignore[arg-type]
    forwarding.allow()
    assert calls.ran[2:] == ["sysctl -w net.inet.ip.forwarding=1"]
    assert sweep(calls, tmp_path) == []  # type: ignore[arg-type]  # its process lives
    assert forwarding.restore() == ["sysctl net.inet.ip.forwarding=1"]
    assert calls.ran[3:] == ["sysctl -w net.inet.ip.forwarding=0"]
    assert forwarding.restore() == []
    assert list(tmp_path.iterdir()) == []


def test_forwarding_that_a_killed_process_left_on(tmp_path: Path) -> None:
    calls = Recorded()
    path = tmp_path / "ztun-utun4.sysctls"
    path.write_text(f'{{"pid": {dead_pid()}, "before": {{"net.inet.ip.forwarding": "0", "kern.evil": "0"}}}}')
    (tmp_path / "ztun-utun5.sysctls").write_text("no JSON")
    assert [left.name for left in left_over(tmp_path)] == ["ztun-utun4.sysctls", "ztun-utun5.sysctls"]
    assert sweep(calls, tmp_path) == ["sysctl net.inet.ip.forwarding=1"]  # type: ignore[arg-type]
    assert calls.ran == ["sysctl -w net.inet.ip.forwarding=0"]
    assert list(tmp_path.iterdir()) == []


def test_forwarding_stays_on_until_the_last_of_two_ends(tmp_path: Path) -> None:
    off = {"-n_net.inet.ip.forwarding": Done(0, "0"), "-n_net.inet6.ip6.forwarding": Done(0, "1")}
    on = {"-n_net.inet.ip.forwarding": Done(0, "1"), "-n_net.inet6.ip6.forwarding": Done(0, "1")}
    one, two = Recorded(**off), Recorded(**on)
    first = Forwarding("utun7", one, tmp_path)  # type: ignore[arg-type]
    second = Forwarding("utun8", two, tmp_path)  # type: ignore[arg-type]
    first.allow()
    second.allow()
    assert first.restore() == []
    assert one.ran[2:] == ["sysctl -w net.inet.ip.forwarding=1"]
    assert second.restore() == ["sysctl net.inet.ip.forwarding=1"]
    assert two.ran[2:] == ["sysctl -w net.inet.ip.forwarding=0"]
    assert list(tmp_path.iterdir()) == []


# The package.


def test_it_can_be_imported_anywhere() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import ztun.platform.darwin"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_of_the_linux_part_is_loaded_there() -> None:
    """With the whole application: the choice between the systems is made in one place, and made once."""
    code = """
        import sys
        from darwin import as_darwin
        as_darwin._become_darwin()
        import ztun.app, ztun.cli.commands
        assert sys.modules["ztun.platform"].open_device.__module__ == "ztun.platform.darwin"
        print([name for name in sys.modules if name.startswith(("ztun.platform.linux", "pyroute2", "bcc"))])
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


def test_the_defaults_of_macos_are_chosen_in_one_place() -> None:
    code = "import sys; sys.platform = 'darwin'; import ztun.defaults; print(*ztun.defaults.DEFAULTS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    paths = ["/var/run/ztun/control.sock", "/var/db/ztun/fake-ip.db"]
    assert done.stdout.split() == ["utun", *paths, "26", "utun", "/var/run/ztun/claims"]


def test_the_launchd_job() -> None:
    """Keys of launchd.plist(5)."""
    job = plistlib.loads((ROOT / "packaging" / "org.ztun.gateway.plist").read_bytes())
    assert job["Label"] == "org.ztun.gateway"
    assert job["ProgramArguments"] == ["/usr/local/bin/ztun", "up", "--config", "/usr/local/etc/ztun/config.json"]
    assert job["RunAtLoad"] is True
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["ExitTimeOut"] >= 10
    assert all(os.path.isabs(job[key]) for key in ("StandardErrorPath", "StandardOutPath"))
    assert job["SoftResourceLimits"]["NumberOfFiles"] >= 65536
