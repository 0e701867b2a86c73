"""`ztun check FILE` as a person types it: what would be done, or every error, and nothing changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MAIN = "import sys; from ztun.cli import main; sys.exit(main())"
SECRET = {"username": "u", "password": "secret"}
GOOD: dict[str, Any] = {
    "capture": {"lan": ["eth1", "eth2"]},
    "dns": {"listen": ["10.0.0.1:53"]},
    "outbounds": [
        {"tag": "office", "type": "socks5", "server": "10.1.1.1:1080", "username": "u", "password": "secret"}
    ],
    "route": {
        "rules": [
            {"domain_suffix": ["corp.example"], "outbound": "office"},
            {"ip_cidr": ["192.0.2.0/24"], "port": [80, "8000-8080"], "protocol": "tcp", "outbound": "block"},
            {"domain": [f"{letter}.example" for letter in "abcdefg"], "priority": -1, "outbound": "direct"},
        ]
    },
}


def check(tmp_path: Path, content: Any, *options: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "ztun.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    command = [sys.executable, "-c", MAIN, "check", str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_it_says_of_whom_a_rule_asks(tmp_path: Path) -> None:
    asked = {"source_mac": "52-54-00-12-34-56", "interface": ["eth1"], "outbound": "block"}
    done = check(tmp_path, {**GOOD, "route": {"rules": [asked]}})
    assert "source_mac 52:54:00:12:34:56, interface eth1 -> block" in done.stdout
    wrong = check(tmp_path, {**GOOD, "route": {"rules": [{**asked, "interface": ["eth9"]}]}})
    assert wrong.returncode == 2
    assert "route.rules[0].interface: 'eth9' is not captured; use one of capture.lan: eth1, eth2" in wrong.stderr


def test_it_says_what_would_be_done(tmp_path: Path) -> None:
    done = check(tmp_path, GOOD)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1:-1] == [
        "  captures   eth1, eth2 (auto)",
        "  dns        10.0.0.1:53",
        "  asks       the name servers of this system",
        "  outbound   office: socks5 10.1.1.1:1080",
        "  rule 0     domain_suffix corp.example -> office",
        "  rule 1     ip_cidr 192.0.2.0/24, port 80 8000-8080, protocol tcp -> block",
        "  rule 2     domain a.example b.example c.example d.example and 3 more, priority -1 -> direct",
        "  default    direct",
    ]


def test_json_tells_the_same_and_no_password(tmp_path: Path) -> None:
    done = check(tmp_path, GOOD, "--json")
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["outbounds"] == [{"tag": "office", "type": "socks5", "server": "10.1.1.1:1080"}]
    assert [rule["outbound"] for rule in report["rules"]] == ["office", "block", "direct"]
    assert "secret" not in done.stdout


def test_prefixes_are_those_of_the_compiled_table(tmp_path: Path) -> None:
    """Rules on addresses add to the table, what the next prefix around them says already does not."""
    rules = [{"ip_cidr": ["192.0.2.0/24", "198.51.100.0/24", "192.0.2.128/25"], "outbound": "block"}]
    few = json.loads(check(tmp_path, {}, "--json").stdout)["prefixes"]
    assert json.loads(check(tmp_path, {"route": {"rules": rules}}, "--json").stdout)["prefixes"] == few + 2


def test_every_error_is_a_line(tmp_path: Path) -> None:
    wrong = {"tun": {"mtu": "big"}, "rote": {}, "route": {"default": "nowhere"}}
    done = check(tmp_path, wrong)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"ztun: {tmp_path}/ztun.json: ") for line in lines)

    done = check(tmp_path, wrong, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"ok": False, "errors": [line.removeprefix("ztun: ") for line in lines]}


@pytest.mark.parametrize(
    ("capture", "says"),
    [
        ({"host": True}, "captures   this host (auto)"),
        ({"host": True, "lan": ["eth1", "eth2"]}, "captures   eth1, eth2 and this host (auto)"),
        ({}, "captures   no interface (auto)"),
    ],
)
def test_whose_packets_are_looked_at_is_said(tmp_path: Path, capture: dict[str, Any], says: str) -> None:
    done = check(tmp_path, {"capture": capture})
    assert says in done.stdout
    done = check(tmp_path, {"capture": capture}, "--json")
    assert json.loads(done.stdout)["capture"] == {"lan": [], "host": False, "backend": "auto", **capture}


@pytest.mark.parametrize(
    ("database", "says"),
    [(None, "cannot read"), (b"text", "is not a MaxMind DB file; give one of countries, ending in .mmdb")],
)
def test_the_country_database_is_looked_at_too(tmp_path: Path, database: bytes | None, says: str) -> None:
    path = tmp_path / "country.mmdb"
    if database is not None:
        path.write_bytes(database)
    rules = [{"geoip": ["de"], "outbound": "direct"}]
    done = check(tmp_path, {"route": {"rules": rules, "geoip_database": str(path)}})
    assert done.returncode == 2
    assert done.stderr.startswith("ztun: route.geoip_database: ")
    assert says in done.stderr
