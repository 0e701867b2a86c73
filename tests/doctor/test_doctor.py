"""`ztun doctor` on faults that are there: in a namespace, or around the process that looks."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from functools import partial
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from doctor.conftest import LAN4, Patient
from doctor.faults import FAULTS, LOGIN, Fault, proxy
from ztun.doctor import CHECKS, Level
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import command
from ztun.platform.linux import facts

DOCUMENT = Path(__file__).parents[2] / "docs" / "doctor.md"
POWERLESS = "setpriv --bounding-set=-all --inh-caps=-all"
HIDE_HEADERS = "mount -t tmpfs none /usr/include/linux"
# Checks that find nothing wrong on this kernel, whatever is done; docs/doctor.md says what they would say elsewhere.
UNPROVOKED = {"compiled", "uso"}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(patient: Patient, fault: Fault) -> None:
    for line in fault.commands:
        patient.namespace.run(*shlex.split(line))
    with patient.namespace.entered(), fault.provoke(patient):
        found = patient.finding(fault.check, fault.config)
    assert found.level.value == fault.level, found
    assert found.remedy
    for word in fault.words:
        assert word in f"{found.detail} -> {found.remedy}"


@pytest.mark.parametrize("check", sorted({fault.check for fault in FAULTS} - {"dns-servers"}))
def test_without_the_fault_the_same_check_is_content(patient: Patient, check: str) -> None:
    found = patient.finding(check, {})
    assert (found.name, found.level, found.remedy) == (check, Level.OK, ""), found


# Faults of files.


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o640, "ok"), (0o644, "warning"), (0o602, "problem")])
def test_a_configuration_that_others_can_read_or_change(patient: Patient, mode: int, level: str) -> None:
    patient.mode = mode
    found = patient.finding("secrets", proxy(**LOGIN))
    assert found.level.value == level
    assert found.remedy.endswith("" if level == "ok" else f"chmod 0600 {patient.directory}/ztun.json")
    assert LOGIN["password"] not in found.detail.replace("passwords", "")


def test_directories_that_cannot_be_written(patient: Patient) -> None:
    (patient.directory / "file").write_text("")
    found = patient.finding("directories", {"log": {"file": str(patient.directory / "file" / "log")}})
    assert found.level is Level.PROBLEM
    assert f"log.file in {patient.directory}/file" in found.detail
    assert patient.finding("directories", {}).level is Level.OK
    assert not (patient.directory / "fake-ip.db").exists(), "looking makes nothing"


def test_a_country_database_that_is_none(patient: Patient) -> None:
    (patient.directory / "country.mmdb").write_text("nonsense")
    found = patient.finding("geoip", {"route": {"geoip_database": str(patient.directory / "country.mmdb")}})
    assert found.level is Level.PROBLEM
    assert "docs/geoip.md" in found.remedy


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("dhcp-option=6,10.77.0.9", "warning"),
        ("dhcp-option=tag:guests,option:dns-server,10.77.0.9,9.9.9.9", "warning"),
        ("dhcp-option=option:dns-server,9.9.9.9", "ok"),  # hijacked on the way
        (f"dhcp-option=option:dns-server,{LAN4}", "ok"),
        ("dhcp-option=3,10.77.0.9", "ok"),  # a router, no resolver
    ],
)
def test_a_resolver_handed_out_past_the_gateway(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, line: str, level: str
) -> None:
    (patient.directory / "dnsmasq.d").mkdir()
    (patient.directory / "dnsmasq.d" / "lan.conf").write_text(f"interface=lan0\n{line}\n")
    monkeypatch.setattr(facts, "dhcp_resolvers", partial(facts.dhcp_resolvers, patient.directory))
    found = patient.finding("dhcp", {})
    assert found.level.value == level, found
    assert (found.level is Level.OK) or "lan.conf" in found.detail


# Faults around the process.


def doctor(
    patient: Patient, around: str = "", *, config: dict[str, Any] | None = None, **environment: str
) -> dict[str, Any]:
    """The findings by name, of a process that is run within `around`; and what it ended with."""
    argv = shlex.join(command("doctor", "--json", "--config", str(patient.write(config or {}))))
    script = f"{around} exec {argv}" if around.endswith(";") else f"exec {around} {argv}"
    wrapped = ("unshare", "-m", "sh", "-c", script)
    done = patient.namespace.run(*wrapped, check=False, env={**os.environ, **environment})
    answer = json.loads(done.stdout)
    findings = {each["name"]: each for each in answer["findings"]}
    assert list(findings) == list(CHECKS)
    assert done.returncode == (1 if answer["problem"] else 0)
    assert answer["problem"] == sum(each["level"] == "problem" for each in answer["findings"])
    return findings


def test_without_any_privilege(patient: Patient) -> None:
    config = {"capture": {"lan": ["lan0"], "backend": "tcx"}}
    found = doctor(patient, POWERLESS, config=config)
    assert found["capabilities"]["level"] == "problem"
    assert "CAP_NET_ADMIN" in found["capabilities"]["detail"]
    assert "root" in found["capabilities"]["remedy"]
    assert found["bpf"]["level"] == "problem"
    assert found["tcx"]["level"] == "warning"
    assert found["xdp"]["level"] == "warning"
    assert "could not be checked" not in json.dumps(found)


def test_without_headers_jit_or_files(patient: Patient) -> None:
    # The setting belongs to the first network namespace; in others it is not shown.
    jit = "mount -t tmpfs none /proc/sys/net/core; echo 0 > /proc/sys/net/core/bpf_jit_enable"
    found = doctor(patient, f"{HIDE_HEADERS}; {jit}; mount --bind /dev/null /dev/net/tun; ulimit -n 512;")
    assert (found["headers"]["level"], found["headers"]["remedy"]) == ("warning", "apt install linux-libc-dev")
    assert found["bpf"]["level"] == "warning"
    assert "linux-libc-dev" in found["bpf"]["detail"]
    assert found["bpf-jit"]["level"] == "warning"
    assert found["tun"]["level"] == "problem"
    assert found["open-files"]["level"] == "problem"
    assert "LimitNOFILE" in found["open-files"]["remedy"]


def test_with_another_bcc_and_no_resolver(patient: Patient) -> None:
    (patient.directory / "bcc").mkdir()
    (patient.directory / "bcc" / "__init__.py").write_text("")
    Path("/etc/netns", patient.namespace.name, "resolv.conf").write_text("")
    found = doctor(patient, PYTHONPATH=str(patient.directory))
    assert found["bcc"]["level"] == "warning"
    assert "is another one" in found["bcc"]["detail"]
    assert "python3-bpfcc" in found["bcc"]["remedy"]
    assert found["resolver"]["level"] == "warning"


def settled(patient: Patient) -> dict[str, str]:
    """The network once the kernel has given its interfaces their link-local addresses."""
    taken = [snapshot(patient.namespace)]

    def is_settled() -> bool:
        taken.append(snapshot(patient.namespace))
        return differences(*taken[-2:]) == [] and taken[-1]["ip -d address"].count("scope link") >= 4

    assert wait_until(is_settled, 20, 0.2)
    return taken[-1]


def test_nothing_is_changed_and_a_person_gets_a_line_for_each(patient: Patient) -> None:
    patient.namespace.run("nft", "add table ip kept")
    before = settled(patient)
    files = sorted(patient.directory.rglob("*"))
    config = patient.write(proxy())
    done = patient.namespace.run(*command("doctor", "--config", str(config)), check=False)
    assert differences(before, snapshot(patient.namespace)) == []
    assert sorted(patient.directory.rglob("*")) == sorted([*files, config])

    lines = done.stdout.splitlines()
    assert len(lines) == len(CHECKS) + 1
    assert [line.split()[1] for line in lines[:-1]] == list(CHECKS)
    assert all(("->" in line) == (not line.startswith("ok")) for line in lines[:-1])
    assert re.fullmatch(rf"{len(CHECKS)} checks: \d+ ok, \d+ warning, \d+ problem", lines[-1])
    assert done.returncode == 1, "nobody listens at the proxy"
    assert done.stderr == ""


def test_a_terminal_gets_80_columns(patient: Patient) -> None:
    config = patient.write({"capture": {"lan": [f"absent{number}" for number in range(20)]}})
    argv = shlex.join(command("doctor", "--config", str(config)))
    done = patient.namespace.run("script", "-qec", f"stty cols 80; {argv}", "/dev/null", check=False)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= 80
    assert re.search(r"^ +-> there are lan0", plain, re.MULTILINE), "the remedy stands below what was found"


def test_wrong_settings_are_said_as_by_up(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"captur": {}}')
    argv = command("doctor", "--config", str(tmp_path / "bad.json"))
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "captur" in done.stderr


def test_every_system_tells_the_same_facts() -> None:
    from ztun.platform.darwin import facts as darwin

    def functions(module: ModuleType) -> set[str]:
        own = {
            name for name, value in vars(module).items() if isfunction(value) and value.__module__ == module.__name__
        }
        return {name for name in own if not name.startswith("_")}

    assert functions(darwin) == functions(facts)


# The document.


def test_every_check_has_its_row() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|(.+)\|(.+)\|$", DOCUMENT.read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == list(CHECKS)
    assert all(cell.strip() for row in rows for cell in row)


def test_every_check_is_provoked() -> None:
    here = Path(__file__).read_text()
    provoked = {fault.check for fault in FAULTS} | set(re.findall(r'(?:found\["|finding\(")([a-z0-9-]+)"', here))
    assert set(CHECKS) - provoked == UNPROVOKED
