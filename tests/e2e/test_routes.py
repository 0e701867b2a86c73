"""`ztun routes` against the kernel's own tools: what it says is what is there, with an instance and without one."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import BASE, RULES
from e2e.traffic import start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.lab.ztun import command

WAITING = "later0"
CONFIG: dict[str, Any] = {**BASE, "capture": {"lan": ["lan0", WAITING]}, "tun": {"name": "ztun0"}}
# Without capabilities but still root, so that it finds its files wherever they are.
POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def tool(lab: Lab, *argv: str) -> Any:
    """What a program that prints JSON says in the gateway."""
    return json.loads(lab.gateway.run(*argv).stdout or "[]")


def sysctls(lab: Lab) -> dict[str, str]:
    lines = lab.gateway.run("sysctl", "-a", "--pattern", "^net", check=False).stdout.splitlines()
    return {key: value for key, _, value in (line.removeprefix("net.").partition(" = ") for line in lines)}


@pytest.fixture(scope="module", params=["tcx", "clsact", "routes"])
def seen(request: pytest.FixtureRequest, lab: Lab) -> Iterator[tuple[Ztun, dict[str, Any], dict[str, str]]]:
    """An instance that has had traffic, what `ztun routes --json` says of it, and the sysctls from before."""
    lab.stop()
    lab.gateway.run("sysctl", "-w", "net.ipv4.conf.lan0.forwarding=0")
    before = sysctls(lab)
    instance = start(lab, {**CONFIG, "capture": {**CONFIG["capture"], "backend": request.param}})
    for _ in range(3):
        lab.curl(f"http://{plan.SITE4}/", check=False)
    yield (
        instance,
        json.loads(instance.command("routes", "--json", "--config", str(instance.config_path)).stdout),
        before,
    )
    lab.stop()
    lab.gateway.run("sysctl", "-w", "net.ipv4.conf.lan0.forwarding=1")


Seen = tuple[Ztun, dict[str, Any], dict[str, str]]


def test_programs_are_those_of_bpftool(lab: Lab, seen: Seen) -> None:
    instance, routes, _ = seen
    assert len(routes["programs"]) == len({(each["hook"], each["ifname"]) for each in routes["programs"]})
    for program in routes["programs"]:
        about = tool(lab, "bpftool", "-j", "prog", "show", "id", str(program["id"]))
        assert about["tag"] == program["tag"], program
        assert about["name"] == program["name"] or program["hook"].startswith("xdp")
    assert {each["id"] for each in routes["programs"]} <= instance.bpf_ids()["prog"]


def test_hooks_are_those_of_the_kernel(lab: Lab, seen: Seen) -> None:
    instance, routes, _ = seen
    said = {(each["ifname"], each["hook"], each["id"]) for each in routes["programs"]}
    assert said == {*links_held(lab, instance), *filters(lab), *xdp(lab)}
    attached = {
        (entry["ifname"], one["hook"], one["id"])
        for entry in routes["interfaces"]
        for one in entry["attached"]
        if one["owner"] == "ztun"
    }
    assert attached == said


def links_held(lab: Lab, instance: Ztun) -> Iterator[tuple[str, str, int]]:
    """TCX links, from fdinfo (proc(5)): Debian 12's bpftool does not know their interfaces."""
    names = {link["ifindex"]: link["ifname"] for link in tool(lab, "ip", "-j", "link")}
    for path in Path("/proc", str(instance.pid), "fdinfo").iterdir():
        about = dict(re.findall(r"^(\w+):\s*(\S+)", path.read_text(), re.MULTILINE))
        if about.get("link_type") == "tcx":
            direction = about["attach_type"].removeprefix("tcx_")
            number = {"46": "ingress", "47": "egress"}.get(direction, direction)
            yield names[int(about["ifindex"])], f"tcx/{number}", int(about["prog_id"])


def filters(lab: Lab) -> Iterator[tuple[str, str, int]]:
    for ifname in ("lan0", "wan0", "ztun0"):
        for direction in ("ingress", "egress"):
            for one in tool(lab, "tc", "-j", "filter", "show", "dev", ifname, direction):
                if "handle" in one.get("options", {}):
                    yield ifname, f"clsact/{direction}", one["options"]["prog"]["id"]


def xdp(lab: Lab) -> Iterator[tuple[str, str, int]]:
    modes = {1: "native", 2: "generic"}
    for link in tool(lab, "ip", "-j", "link"):
        if "xdp" in link:
            yield link["ifname"], f"xdp/{modes[link['xdp']['mode']]}", link["xdp"]["prog"]["id"]


def test_maps_are_those_of_bpftool(lab: Lab, seen: Seen) -> None:
    instance, routes, _ = seen
    tables = {table["name"]: table for table in routes["maps"]}
    held = [tool(lab, "bpftool", "-j", "map", "show", "id", str(number)) for number in instance.bpf_ids()["map"]]
    known = {about["name"]: about for about in held if about["name"] in tables}
    if routes["backend"] == "routes":
        assert not held
        [table] = tables.values()
        number = table["name"].removeprefix("table ")
        anywhere = {"-4": "0.0.0.0/0", "-6": "::/0"}
        installed = {
            (anywhere[family] if route["dst"] == "default" else _full(route["dst"]), route.get("type", "unicast"))
            for family in anywhere
            for route in tool(lab, "ip", family, "-j", "route", "show", "table", number)
        }
        types = {"tunnel": "unicast", "direct": "throw", "drop": "blackhole"}
        assert installed == {(entry["prefix"], types[entry["verdict"]]) for entry in table["entries"]}
        return
    assert known.keys() == tables.keys()
    for name, table in tables.items():
        assert table["type"] == known[name]["type"]
        if name.startswith("prefixes"):
            dumped = tool(lab, "bpftool", "-j", "map", "dump", "id", str(known[name]["id"]))
            assert len(dumped) == len(table["entries"]) == table["count"]
            assert _is_told(dumped, table["entries"])


def _is_told(dumped: list[dict[str, Any]], entries: list[dict[str, Any]]) -> bool:
    """Whether hits are those of the kernel's table; of what is direct some may not be in there yet."""
    told = {}
    for one in dumped:
        key, value = (bytes(int(byte, 16) for byte in one[part]) for part in ("key", "value"))
        family = socket.AF_INET if len(key) == 8 else socket.AF_INET6
        # struct decision: verdict, rule, hits.
        told[f"{socket.inet_ntop(family, key[4:])}/{key[0]}"] = int.from_bytes(value[8:16], "little")
    shown = {entry["prefix"]: entry["hits"] for entry in entries}
    direct = {entry["prefix"] for entry in entries if entry["verdict"] == "direct"}
    return told.keys() == shown.keys() and all(
        hits == told[name] or (name in direct and hits > told[name]) for name, hits in shown.items()
    )


def _full(destination: str) -> str:
    return destination if "/" in destination else f"{destination}/{128 if ':' in destination else 32}"


def test_hits_and_counters_are_what_was_sent(seen: Seen) -> None:
    _, routes, _ = seen
    assert routes["counters"]["tunnel"]["packets"] >= 3
    if routes["backend"] != "routes":
        [table] = [table for table in routes["maps"] if table["name"] == "prefixes4"]
        [entry] = [entry for entry in table["entries"] if entry["prefix"] == "203.0.113.0/24"]
        assert entry["hits"] >= 3
        assert RULES[entry["rule"]]["outbound"] == "socks-udp"


def test_routes_and_rules_are_those_of_iproute2(lab: Lab, seen: Seen) -> None:
    _, routes, _ = seen
    main = [
        route for family in ("-4", "-6") for route in tool(lab, "ip", family, "-j", "route", "show", "dev", "ztun0")
    ]
    assert {route["destination"] for route in routes["routes"]} == {route["dst"] for route in main}
    rules = [rule for family in ("-4", "-6") for rule in tool(lab, "ip", family, "-j", "-N", "rule", "show")]

    def seen_as(some: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
        return sorted((rule["priority"], rule["iif"], str(rule["table"])) for rule in some)

    tagged = [rule for rule in rules if str(rule.get("protocol")) == "122"]
    assert seen_as(routes["ip_rules"]) == seen_as(tagged)
    assert bool(tagged) == (routes["backend"] == "routes")


def test_sysctls_are_those_of_proc(lab: Lab, seen: Seen) -> None:
    _, routes, before = seen
    now = sysctls(lab)
    changed = {entry["key"]: entry for entry in routes["sysctls"]}
    for key, entry in changed.items():
        assert now[key] == entry["now"], key
        assert before.get(key, entry["before"]) == entry["before"], key
    # And the other way round: whatever differs of what was there is told of.
    ours = ("ipv4.conf.", "ipv6.conf.", "ipv4.ip_forward")  # others, such as counts of connections, move on their own
    assert {key for key in before if key.startswith(ours) and now.get(key) != before[key]} <= changed.keys()
    assert ("ipv4.conf.lan0.forwarding" in changed) == (routes["backend"] == "routes")


def test_state_heartbeat_and_what_is_waited_for(seen: Seen) -> None:
    instance, routes, _ = seen
    assert (routes["state"], routes["pid"], routes["device"]) == ("running", instance.pid, "ztun0")
    assert routes["waiting"] == [WAITING]
    assert routes["leftovers"] == []
    lan = {entry["ifname"]: entry for entry in routes["interfaces"]}
    assert (lan["lan0"]["state"], lan["lan0"]["link"], lan["lan0"]["role"]) == ("captured", "up", "lan")
    assert (lan[WAITING]["state"], lan[WAITING]["link"]) == ("absent", "absent")
    assert lan["ztun0"]["role"] == "tun"
    if routes["backend"] == "routes":
        assert routes["heartbeat"] is None
    else:
        assert routes["heartbeat"]["age_ms"] is not None
        assert routes["heartbeat"]["stale"] == (routes["heartbeat"]["age_ms"] > routes["heartbeat"]["limit_ms"])


def test_every_line_fits_a_terminal(seen: Seen) -> None:
    instance, _, _ = seen
    text = instance.command("routes", "--all", "--config", str(instance.config_path)).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert f"waiting for {WAITING}" in text


# Watching.


def watching(lab: Lab, instance: Ztun, *options: str, **keywords: Any) -> subprocess.Popen[Any]:
    argv = command("routes", "--watch", "--interval", "0.3", "--config", str(instance.config_path), *options)
    return lab.gateway.spawn(*argv, **keywords)


def test_watching_in_a_pipe_gives_rates_and_ends_well(lab: Lab, any_ztun: Ztun) -> None:
    process = watching(lab, any_ztun, "--json", stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    assert "packets_per_s" not in first["counters"]["tunnel"]
    rates = []
    for _ in range(20):
        lab.curl(f"http://{plan.SITE4}/", check=False)
        rates.append(json.loads(process.stdout.readline())["counters"]["tunnel"]["packets_per_s"])
        if rates[-1] > 0:
            break
    assert rates[-1] > 0
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def test_watching_on_a_terminal_stays_in_place(lab: Lab, any_ztun: Ztun) -> None:
    ours, theirs = pty.openpty()
    os.set_inheritable(theirs, True)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with watching(lab, any_ztun, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        text = b""
        deadline = time.monotonic() + 20
        while text.count(b"\x1b[H") < 3 and time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                text += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        with_end = text + _rest(ours)
    os.close(ours)
    assert with_end.startswith(b"\x1b[?1049h"), "on the alternate screen"
    assert with_end.rstrip().endswith(b"\x1b[?25h\x1b[?1049l"), "which is left at the end"
    for screen in text.split(b"\x1b[H")[1:3]:
        lines = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", screen).decode().split("\r\n")
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert "Ctrl-C ends" in lines[0]
        assert "more lines" in lines[-1]


def _rest(fd: int) -> bytes:
    data = b""
    try:
        while select.select([fd], [], [], 0.5)[0]:
            data += os.read(fd, 65536)
    except OSError:  # EIO: nobody has the other end any more
        pass
    return data


def test_watching_goes_on_when_the_instance_dies_and_comes_back(lab: Lab) -> None:
    instance = start(lab, {**CONFIG, "capture": {"lan": ["lan0"], "backend": "clsact"}})
    process = watching(lab, instance, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None

    def next_state(*wanted: str) -> dict[str, Any]:
        for line in process.stdout or ():
            answer: dict[str, Any] = json.loads(line)
            if answer["state"] in wanted:
                return answer
        raise AssertionError("it ended")

    assert next_state("running")["pid"] == instance.pid
    instance.kill()
    assert next_state("not running")["leftovers"]
    instance.launch("up", "--config", str(instance.config_path))
    assert next_state("running")["pid"] == instance.pid
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert process.stderr.read() == ""


# Without an instance that answers.


def test_a_dead_instance_is_seen_through_what_it_left(lab: Lab) -> None:
    instance = start(lab, {**CONFIG, "capture": {"lan": ["lan0"], "backend": "clsact"}})
    lab.curl(f"http://{plan.SITE4}/")
    instance.kill()
    wait_until(lambda: "ztun0" not in lab.gateway.run("ip", "link").stdout)

    def look() -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        done = instance.command("routes", "--json", "--config", str(instance.config_path), check=False)
        return done, json.loads(done.stdout)

    assert wait_until(lambda: (look()[1]["heartbeat"] or {}).get("stale"), 30)
    done, routes = look()

    assert done.returncode == 1
    assert done.stderr.startswith("ztun: not running")
    assert routes["state"] == "not running"
    assert any("lan0" in line for line in routes["leftovers"])
    [program] = [each for each in routes["programs"] if each["hook"] == "clsact/ingress"]
    assert program["id"] == next(
        number for name, hook, number in filters(lab) if (name, hook) == ("lan0", "clsact/ingress")
    )
    assert routes["heartbeat"]["stale"]
    assert routes["counters"]["tunnel"]["packets"] > 0
    [table] = [table for table in routes["maps"] if table["name"] == "prefixes4"]
    assert next(entry for entry in table["entries"] if entry["prefix"] == "203.0.113.0/24")["hits"] > 0

    text = instance.command("routes", "--config", str(instance.config_path), check=False).stdout
    assert text.startswith("not running")
    assert "stale" in text
    assert max(map(len, text.splitlines())) <= 80
    assert look()[1]["leftovers"] == routes["leftovers"], "looking removed nothing"


def test_without_privilege_it_says_what_it_could_not_see(lab: Lab) -> None:
    instance = start(lab, {**CONFIG, "capture": {"lan": ["lan0"], "backend": "tcx"}})
    argv = command("routes", "--json", "--socket", str(instance.directory / "nobody.sock"))
    done = lab.gateway.run(*POWERLESS, *argv, check=False)
    routes = json.loads(done.stdout)
    assert done.returncode == 1
    assert routes["state"] == "not running"
    assert any("CAP_NET_ADMIN" in line for line in routes["unseen"])

    instance.socket_path.chmod(0)
    done = lab.gateway.run(*POWERLESS, *command("routes", "--config", str(instance.config_path)), check=False)
    assert done.returncode == 1
    assert "may not use the control socket" in done.stderr
    assert done.stdout.startswith("unknown")
    assert "Not seen" in done.stdout
    instance.socket_path.chmod(0o600)
