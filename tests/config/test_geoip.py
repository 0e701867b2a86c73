"""Countries out of a MaxMind DB file, for single addresses and as networks for the kernel."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from mmdb import write_database

from ztun.errors import ConfigError
from ztun.geoip import CountryDatabase
from ztun.ports import Verdict
from ztun.rules import FlowInfo, Rule, Rules, compile_prefixes

WORLD = {
    "192.0.2.0/24": {"country": {"iso_code": "DE"}},
    "198.51.100.0/25": {"country": {"iso_code": "FR"}},
    "198.51.100.128/25": {"country": {"iso_code": "DE"}},
    "203.0.113.0/24": {"registered_country": {"iso_code": "DE"}},
    "2001:db8::/32": {"country": {"iso_code": "DE"}},
    "2001:db9::/32": {"country": "DE"},
}


@pytest.fixture
def database(tmp_path: Path) -> CountryDatabase:
    path = tmp_path / "country.mmdb"
    write_database(path, WORLD)
    return CountryDatabase(path)


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("192.0.2.255", "de"),
        ("192.0.3.0", None),
        ("198.51.100.127", "fr"),
        ("198.51.100.128", "de"),
        ("203.0.113.1", None),
        ("2001:db8::1", "de"),
        ("2001:db9::1", None),
        ("2001:dba::1", None),
    ],
)
def test_the_country_of_an_address(database: CountryDatabase, address: str, code: str | None) -> None:
    assert database.country(ip_address(address).packed) == code


def test_the_networks_of_countries(database: CountryDatabase) -> None:
    assert database.networks_of({"de", "it"}) == {
        "de": [ip_network("192.0.2.0/24"), ip_network("198.51.100.128/25"), ip_network("2001:db8::/32")],
        "it": [],
    }


def test_the_kernel_and_the_flows_are_told_the_same(database: CountryDatabase) -> None:
    rules = Rules([Rule("block", geoip=("de",))], "direct", database.country)
    table = compile_prefixes(rules, (), (), (), database.networks_of({"de"}).__getitem__)
    dropped = {ip_network((entry.network, entry.length)) for entry in table if entry.verdict is Verdict.DROP}
    assert dropped == {ip_network("192.0.2.0/24"), ip_network("198.51.100.128/25"), ip_network("2001:db8::/32")}
    client = bytes([10, 0, 0, 7])
    assert rules.decide(FlowInfo("tcp", client, bytes([192, 0, 2, 1]), None, 80)).outbound == "block"
    assert rules.decide(FlowInfo("tcp", client, bytes([198, 51, 100, 1]), None, 80)).outbound == "direct"


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^route\.geoip_database: cannot read .*: No such file or directory$"):
        CountryDatabase(tmp_path / "nowhere.mmdb")


def test_a_file_of_another_kind_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no database")
    with pytest.raises(ConfigError, match=r"^route\.geoip_database: .* is not a MaxMind DB file"):
        CountryDatabase(path)
