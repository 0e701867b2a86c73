"""The log and the metrics of a running gateway, as an operator uses them."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from e2e.conftest import BASE
from e2e.traffic import ask_udp, start
from ztun.control.metrics import ROWS
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import run, wait_until
from ztun.lab.ztun import command, complete

DOCUMENT = Path(__file__).parents[2] / "docs" / "logging.md"
TYPES = {"text": str, "number": int | float, "text, null": str | None}
# Figures that other metrics give in a different form.
TOLD_OTHERWISE = {"tcp.packets", "udp.packets", "icmp.packets", "pid", "privileges.user"}


class Instance:
    """A gateway whose log is JSON in a file."""

    def __init__(self, lab: Lab, **log: Any) -> None:
        self.path = lab.directory / "ztun.log"
        for old in lab.directory.glob("ztun.log*"):
            old.unlink()
        self.ztun = start(lab, {**BASE, "log": {"format": "json", "file": str(self.path), **log}})

    def events(self, *names: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [event for event in events if not names or event["event"] in names]

    def awaits(self, condition: Callable[[dict[str, Any]], bool], *names: str) -> dict[str, Any]:
        """The first event for which `condition` holds, within two seconds."""
        wait_until(lambda: any(condition(event) for event in self.events(*names)), 2)
        return next(event for event in self.events(*names) if condition(event))

    def command(self, *arguments: str) -> str:
        return self.ztun.command(*arguments, "--socket", str(self.ztun.socket_path)).stdout


@pytest.fixture
def instance(lab: Lab) -> Iterator[Instance]:
    yield Instance(lab)
    lab.stop()


def field_table(title: str) -> dict[str, str]:
    """field -> type, of the table below a heading of docs/logging.md."""
    section = DOCUMENT.read_text().partition(title)[2].partition("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \|", section, re.MULTILINE)
    return dict(rows)


def test_every_flow_gets_a_line_when_it_is_over(lab: Lab, instance: Instance) -> None:
    form = "\n%{local_port} %{size_request} %{size_header} %{size_download}"
    port, sent, header, body = map(int, lab.curl("-w", form, "http://site.test/").stdout.splitlines()[-1].split())

    event = instance.awaits(lambda event: event["name"] == "site.test", "flow ended")
    assert event["client"] in (f"{plan.CLIENT4}:{port}", f"[{plan.CLIENT6}]:{port}")
    assert event["destination"] == "site.test:80"
    assert event["outbound"] == "socks"
    assert instance.ztun.config["route"]["rules"][event["rule"]] == {"domain_suffix": ["test"], "outbound": "socks"}
    assert (event["up"], event["down"]) == (sent, header + body)
    assert (event["protocol"], event["how"]) == ("tcp", "finished")
    assert 0 < event["seconds"] < 10


def test_a_flow_that_was_refused_gets_one_with_the_reason(lab: Lab, instance: Instance) -> None:
    lab.curl("http://gone.bulk.test/", check=False)

    event = instance.awaits(lambda event: event["name"] == "gone.bulk.test", "flow refused")
    assert (event["outbound"], event["how"]) == ("socks-gone", "proxy unreachable")
    assert "Connection refused" in event["detail"]


def test_a_udp_session_gets_one_as_well(lab: Lab, instance: Instance) -> None:
    ask_udp(lab.client, plan.SITE4, plan.ECHO_PORT, b"hello")
    lab.stop()

    event = instance.awaits(lambda event: event["protocol"] == "udp", "flow ended")
    assert event["destination"] == f"{plan.SITE4}:{plan.ECHO_PORT}"
    assert event["client"].startswith(plan.CLIENT4)
    assert (event["up"], event["down"], event["destinations"], event["how"]) == (5, 5, 1, "aborted")


@pytest.mark.parametrize("event", ["flow ended", "flow refused"])
def test_the_documented_fields_are_those_there_are(lab: Lab, instance: Instance, event: str) -> None:
    lab.page("http://site.test/")
    lab.page(f"http://{plan.SITE4}/")
    lab.curl("http://gone.bulk.test/", check=False)
    ask_udp(lab.client, plan.SITE4, plan.ECHO_PORT, b"hello")
    lab.stop()

    everywhere, ended = field_table("## Format"), field_table("### `flow ended`")
    only_ended = {"up", "down", "destinations"}
    assert list(everywhere) == ["timestamp", "level", "logger", "event"]
    assert only_ended < ended.keys()
    if event == "flow ended":
        documented = everywhere | ended
    else:
        kept = {field: type for field, type in ended.items() if field not in only_ended}
        documented = everywhere | kept | field_table("### `flow refused`")
    lines = instance.events(event)
    assert len(lines) >= (3 if event == "flow ended" else 1)
    for line in lines:
        expected = documented if line["protocol"] == "udp" else documented.keys() - {"destinations"}
        assert set(line) == set(expected)
        for field, value in line.items():
            assert isinstance(value, TYPES[documented[field]]), f"{field}: {value!r}"


def test_the_level_of_a_component_changes_while_it_runs(lab: Lab, instance: Instance) -> None:
    def ask() -> list[dict[str, Any]]:
        before = len(instance.events("name asked"))
        lab.dig("site.test")
        return instance.events("name asked")[before:]

    assert ask() == []
    assert re.search(r"^ *dns +debug +its own", instance.command("log-level", "debug", "dns"), re.MULTILINE)
    assert [event["level"] for event in ask()] == ["debug"]
    assert {event["logger"] for event in instance.events("name asked")} == {"ztun.dns"}
    assert json.loads(instance.command("log-level", "--json"))["components"]["dns"] == "debug"
    instance.command("log-level", "default", "dns")
    assert ask() == []


def test_what_the_stack_drops_is_told_at_debug(lab: Lab, instance: Instance) -> None:
    instance.command("log-level", "debug", "stack")

    def drop() -> bool:
        # A SYN to a Fake-IP that stands for no name.
        lab.curl("--connect-timeout", "1", "http://198.18.77.77/", check=False)
        return bool(instance.events("packets dropped"))

    assert wait_until(drop, 6)
    event = instance.events("packets dropped")[0]
    assert (event["logger"], event["reason"]) == ("ztun.stack", "fake-ip-unmapped")
    instance.command("log-level", "info", "stack")


def test_a_general_level_in_the_configuration_leaves_components_their_own(lab: Lab) -> None:
    instance = Instance(lab, level="warning", levels={"dns": "debug"})
    lab.page("http://site.test/")
    lab.stop()

    assert {event["logger"] for event in instance.events()} == {"ztun.dns"}


def test_sighup_follows_a_rename(lab: Lab, instance: Instance) -> None:
    lab.page("http://site.test/")
    instance.awaits(lambda event: True, "flow ended")
    moved = instance.path.rename(instance.path.with_suffix(".moved"))
    before = moved.stat().st_size

    os.kill(instance.ztun.pid, signal.SIGHUP)
    assert wait_until(instance.path.exists, 2)
    lab.page("http://www.site.test/")
    event = instance.awaits(lambda event: True, "flow ended")

    assert event["name"] == "www.site.test"
    assert instance.events()[0]["event"] == "log file opened again"
    assert moved.stat().st_size == before
    assert instance.ztun.alive
    assert instance.ztun.stop() == 0


def test_it_rotates_by_size(lab: Lab) -> None:
    instance = Instance(lab, levels={"dns": "debug"}, rotate={"size": 8192, "keep": 2}, repeats=None)
    for number in range(150):
        lab.client.run("dig", "+short", f"name{number}.bulk.test")

    files = [instance.path, *(Path(f"{instance.path}.{number}") for number in (1, 2))]
    assert all(0 < file.stat().st_size <= 8192 for file in files)
    assert not Path(f"{instance.path}.3").exists()
    events = [json.loads(line) for file in reversed(files) for line in file.read_text().splitlines()]
    numbers = [int(event["name"][4:].partition(".")[0]) for event in events if event["event"] == "name asked"]
    assert numbers == list(range(numbers[0], 150))
    lab.stop()


@pytest.mark.parametrize("format", ["console", "json"])
def test_no_secret_is_in_a_whole_log_at_debug(lab: Lab, format: str) -> None:
    """Right passwords and wrong ones, through SOCKS5 and HTTP."""
    wrong = "wrong-battery'staple\\ü"
    outbounds = [
        {**outbound, "password": wrong} if outbound["tag"] == "socks-badauth" else outbound
        for outbound in [
            *BASE["outbounds"],
            {
                "tag": "http-badauth",
                "type": "http",
                "server": f"{plan.UPSTREAM4}:{plan.HTTP_PROXY_AUTH_PORT}",
                "username": plan.PROXY_USER,
                "password": wrong,
            },
        ]
    ]
    rules = [{"domain_suffix": ["badhttp.bulk.test"], "outbound": "http-badauth"}, *BASE["route"]["rules"]]
    path = lab.directory / "secrets.log"
    path.unlink(missing_ok=True)
    log = {"format": format, "file": str(path), "level": "debug", "repeats": None}
    instance = start(lab, {**BASE, "outbounds": outbounds, "route": {"rules": rules}, "log": log})
    for name in ("auth.bulk.test", "web.test"):
        lab.page(f"http://{name}/")
    for name in ("badauth.bulk.test", "badhttp.bulk.test", "gone.bulk.test"):
        assert lab.curl(f"http://{name}/", check=False).returncode != 0
    instance.command("status", "--socket", str(instance.socket_path))
    instance.command("log-level", "info", "--socket", str(instance.socket_path))
    instance.command("log-level", "debug", "--socket", str(instance.socket_path))
    instance.stop()

    text = path.read_text() + instance.output
    for expected in ("auth.bulk.test", "badhttp.bulk.test", "401 Unauthorized", "flow refused", "stopping"):
        assert expected in text
    for password in (plan.PROXY_PASSWORD, wrong):
        octets = password.encode()
        basic = base64.b64encode(f"{plan.PROXY_USER}:{password}".encode()).decode()
        for form in (password, repr(password)[1:-1], repr(octets)[2:-1], basic, json.dumps(password)[1:-1]):
            assert form not in text
    assert "battery" not in text
    assert "horse" not in text


def test_names_from_the_wire_come_escaped(lab: Lab) -> None:
    instance = Instance(lab, levels={"dns": "debug"})
    # dig takes \DDD for any octet: ESC, a bidirectional override in UTF-8, a line end.
    lab.dig(r"evil\027[2J\226\128\174\010level=error.bulk.test")
    event = instance.awaits(lambda event: "evil" in event["name"], "name asked")
    lab.stop()

    assert event["name"].isprintable()
    raw = instance.path.read_bytes()
    assert b"\x1b" not in raw
    assert b"\\u001b" not in raw
    assert "\u202e".encode() not in raw
    assert b"\\u202e" not in raw.replace(b"\\\\u202e", b"")


def test_a_log_that_nobody_reads_does_not_stop_the_traffic(lab: Lab) -> None:
    """Standard error is a pipe that is full from the start."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    lab.stop()
    instance = lab.prepare()
    instance.write(complete({**BASE, "log": {"level": "debug"}}, instance.directory))
    process = lab.gateway.spawn(
        *command("up", "--config", str(instance.config_path)), stdout=subprocess.DEVNULL, stderr=writer
    )
    instance._process = process
    try:
        assert wait_until(lambda: instance.socket_path.exists() and _is_running(instance), 15)
        for _ in range(5):
            assert lab.page("http://site.test/")["client"] == plan.UPSTREAM4
        log = instance.status()["log"]
        assert log["dropped"] > 5
        assert log["fault"] == "nobody reads standard error"
        os.close(reader)
        assert lab.page("http://site.test/")["client"] == plan.UPSTREAM4
    finally:
        os.close(writer)
        assert instance.stop() == 0


def _is_running(instance: Ztun) -> bool:
    try:
        return bool(instance.status()["state"] == "running")
    except (OSError, ValueError):
        return False


# Metrics.


def metrics_of(instance: Ztun) -> dict[str, Any]:
    """Family -> metric, as curl gets them and the library's own parser reads them."""
    done = run(["curl", "-sS", "--unix-socket", str(instance.socket_path), "http://x/metrics"])
    return {family.name: family for family in text_string_to_metric_families(done.stdout)}


def numbers_in(status: Any, path: str = "") -> Iterator[str]:
    """The paths of all figures of a status."""
    if isinstance(status, dict):
        for key, value in status.items():
            key = key.replace(".", "_")  # of an address
            yield from numbers_in(value, f"{path}.{key}" if path else key)
    elif isinstance(status, int | float) and not isinstance(status, bool):
        yield path


def test_every_figure_of_the_status_is_a_metric(lab: Lab, any_ztun: Ztun) -> None:
    lab.page("http://site.test/")
    lab.page(f"http://[{plan.SITE6}]/")
    lab.curl("http://gone.bulk.test/", check=False)
    lab.client.run("ping", "-c", "1", "-W", "1", lab.dig("site.test"), check=False)
    ask_udp(lab.client, plan.SITE4, plan.ECHO_PORT, b"hello")
    status = any_ztun.status()

    # Of a DNS server's latency, the sum and the answers tell count and mean.
    patterns = [re.compile(re.sub(r"\\\{\w+\\\}", "[^.]+", re.escape(row.path))) for row in ROWS]
    patterns.append(re.compile(r"dns\.servers\.[^.]+\.latency\.(count|mean_s)"))
    missing = [
        path
        for path in numbers_in(status)
        if path not in TOLD_OTHERWISE and not any(pattern.fullmatch(path) for pattern in patterns)
    ]
    assert missing == []


def test_metrics_are_what_the_status_says(lab: Lab, any_ztun: Ztun) -> None:
    lab.page("http://site.test/")
    lab.page(f"http://[{plan.SITE6}]/")
    lab.page(f"http://{plan.SITE4}/")
    before, found, after = any_ztun.status(), metrics_of(any_ztun), any_ztun.status()

    total = found["ztun_tcp_flows"].samples[0].value
    assert before["tcp"]["total"] <= total <= after["tcp"]["total"]
    packets = {sample.labels["family"]: sample.value for sample in found["ztun_tcp_packets"].samples}
    assert packets["ipv4"] > 3
    assert packets["ipv6"] > 3
    assert sum(packets.values()) <= after["tcp"]["packets"]
    assert {sample.labels["event"] for sample in found["ztun_dns_events"].samples} == after["dns"].keys() - {"servers"}
    assert [sample.labels["ztun_state"] for sample in found["ztun_state"].samples if sample.value] == ["running"]
    assert found["ztun_log_lines_written"].samples[0].value >= 0


def test_every_documented_metric_that_is_always_there_is_there(lab: Lab, any_ztun: Ztun) -> None:
    lab.page("http://site.test/")
    found = metrics_of(any_ztun)

    always = {row.name for row in ROWS if "{" not in row.path}
    assert always <= found.keys()
