"""What a good configuration is read as."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
from config_cases import design, parse
from pydantic import ValidationError

from ztun.config import Settings, to_rules
from ztun.gateway.limits import Limits
from ztun.rules import Decision, FlowInfo, NameKind


def test_the_configuration_of_the_design_is_read_as_it_stands() -> None:
    settings = parse(design())
    assert settings.tun.address == ip_interface("198.18.0.1/15")
    assert settings.tun.address6 == ip_interface("2001:2::1/48")
    assert settings.capture.lan == ("eth1",)
    assert settings.dns.listen == ("10.0.0.1:53",)
    assert settings.dns.servers == ("udp://9.9.9.9:53", "tls://9.9.9.9:853", "https://dns.quad9.net:443/dns-query")
    assert settings.dns.fake_ip.store == Path("/var/lib/ztun/fake-ip.db")
    office, web = settings.outbounds
    assert (office.tag, office.type, office.host, office.port, office.username) == (
        "office", "socks5", "10.1.1.1", 1080, "u",
    )  # fmt: skip
    assert office.password is not None
    assert office.password.get_secret_value() == "p"
    assert (web.type, web.host, web.port, web.username, web.password) == ("http", "10.1.1.2", 3128, None, None)
    assert settings.route.rules[1].ip_cidr == (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
    assert settings.route.rules[1].port == ((80, 80), (443, 443))
    assert settings.route.rules[1].protocol == ("tcp",)
    assert settings.route.geoip_database == Path("/var/lib/ztun/country.mmdb")
    assert settings.timeouts.dial == 10
    assert settings.log.file is None


def test_what_the_design_shows_for_the_device_and_the_numbers_is_what_holds_without_it() -> None:
    shown, left_out = parse(design()), parse({})
    for section in ("tun", "pool", "timeouts", "log", "control"):
        assert getattr(left_out, section) == getattr(shown, section)
    assert left_out.dns.fake_ip == shown.dns.fake_ip
    assert left_out.dns.hijack
    assert (left_out.capture.lan, left_out.capture.backend, left_out.capture.fail) == ((), "auto", "open")
    assert (left_out.outbounds, left_out.route.rules, left_out.route.default) == ((), (), "direct")


def test_the_limits_that_are_left_out_are_those_of_the_gateway() -> None:
    assert Limits(**parse({}).limits.model_dump()) == Limits()
    assert Limits(**parse({"limits": {"udp_sessions": 7}}).limits.model_dump()) == Limits(udp_sessions=7)


@pytest.mark.parametrize("section", [*design()])
def test_every_section_may_be_left_out(section: str) -> None:
    document = design()
    del document[section]
    if section == "outbounds":
        document["route"] = {}
    assert isinstance(parse(document), Settings)


def test_it_tells_what_was_given_from_what_was_left_out() -> None:
    assert "listen" not in parse({"dns": {"hijack": True}}).dns.model_fields_set
    assert "listen" in parse({"dns": {"listen": []}}).dns.model_fields_set
    assert "listen" not in parse({"dns": {"fake_ip": {"range": "10.200.0.0/16"}}}).dns.model_fields_set


def test_the_tun_takes_the_first_hosts_of_the_fake_ranges_where_its_addresses_are_left_out() -> None:
    settings = parse({"dns": {"fake_ip": {"range": "10.200.0.0/16", "range6": "2001:2:0:1::/64"}}})
    assert settings.tun.address == ip_interface("10.200.0.1/16")
    assert settings.tun.address6 == ip_interface("2001:2:0:1::1/64")


@pytest.mark.parametrize("document", [{"tun": {"address6": None}}, {"dns": {"fake_ip": {"range6": None}}}])
def test_ipv6_is_left_off_by_either_key(document: dict[str, Any]) -> None:
    settings = parse(document)
    assert settings.tun.address6 is None
    assert settings.dns.fake_ip.range6 is None


@pytest.mark.parametrize(
    "document",
    [
        {"tun": {"mtu": 576, "address6": None}},
        {"tun": {"mtu": 1280}},
        {"tun": {"mtu": 65535, "name": "fifteen-letters"}},
        {"timeouts": {"dial": 0.001}},
        {"dns": {"fake_ip": {"range": "10.0.0.0/24", "size": 253}}},
        {"route": {"rules": [{"port": ["1", 65535, "1-65535"], "outbound": "block"}]}},
        {"route": {"rules": [{"domain": ["a", "a.b.c"], "domain_suffix": "b.c", "outbound": "dns"}]}},
        {"route": {"rules": [{"domain": ".".join(["x" * 63] * 3), "outbound": "direct"}]}},
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(document: dict[str, Any]) -> None:
    assert isinstance(parse(document), Settings)


def test_one_value_may_stand_without_a_list() -> None:
    rule = {"ip_cidr": "192.0.2.0/24", "port": "8000-8999", "protocol": "udp", "source_cidr": "10.0.0.7"}
    (read,) = parse({"route": {"rules": [{**rule, "outbound": "block"}]}}).route.rules
    assert read.ip_cidr == (ip_network("192.0.2.0/24"),)
    assert read.port == ((8000, 8999),)
    assert read.protocol == ("udp",)
    assert read.source_cidr == (ip_network("10.0.0.7/32"),)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Corp.Example.", "corp.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("_dmarc.example", "_dmarc.example"),
        ("localhost", "localhost"),
    ],
)
def test_names_are_kept_as_a_labels_in_lower_case(written: str, read: str) -> None:
    rules = [{"domain": written, "domain_suffix": written, "outbound": "block"}]
    (rule,) = parse({"route": {"rules": rules}}).route.rules
    assert (rule.domain, rule.domain_suffix) == ((read,), (read,))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("udp://9.9.9.9", "udp://9.9.9.9:53"),
        ("tcp://9.9.9.9:5353/", "tcp://9.9.9.9:5353"),
        ("tls://[2620:fe::fe]", "tls://[2620:fe::fe]:853"),
        ("TLS://dns.quad9.net", "tls://dns.quad9.net:853"),
        ("https://dns.quad9.net/dns-query", "https://dns.quad9.net:443/dns-query"),
        ("https://[2620:fe::fe]:8443", "https://[2620:fe::fe]:8443"),
    ],
)
def test_dns_servers_get_the_port_of_their_scheme(written: str, read: str) -> None:
    assert parse({"dns": {"servers": [written]}}).dns.servers == (read,)


def test_listen_addresses_of_both_families() -> None:
    listen = ["10.0.0.1:53", "[2001:DB8:0::1]:5353", "0.0.0.0:53"]
    assert parse({"dns": {"listen": listen}}).dns.listen == ("10.0.0.1:53", "[2001:db8::1]:5353", "0.0.0.0:53")


def test_servers_of_proxies_may_be_named_or_have_either_family() -> None:
    servers = ["proxy.Corp.example:3128", "[2001:db8::1]:1080", "192.0.2.1:1"]
    outbounds = [{"tag": f"p{index}", "type": "http", "server": server} for index, server in enumerate(servers)]
    read = parse({"outbounds": outbounds}).outbounds
    assert [(outbound.host, outbound.port) for outbound in read] == [
        ("proxy.corp.example", 3128),
        ("2001:db8::1", 1080),
        ("192.0.2.1", 1),
    ]


def test_what_is_written_out_again_is_read_as_the_same() -> None:
    document = design()
    del document["outbounds"][0]["username"], document["outbounds"][0]["password"]  # it is not written out
    document["route"]["rules"][1]["port"].append("8000-8999")
    settings = parse(document)
    assert parse(settings.model_dump_json(exclude_unset=True)) == settings


def test_settings_cannot_be_changed() -> None:
    settings = parse(design())
    with pytest.raises(ValidationError, match="frozen"):
        settings.tun.mtu = 9000  # type: ignore[misc]


def test_the_rules_decide_as_they_were_written() -> None:
    document = design()
    document["route"]["rules"].append({"domain_keyword": "corp", "outbound": "web", "priority": -1})
    rules = to_rules(parse(document), country=lambda address: "de" if address[0] == 203 else None)
    client = bytes([10, 0, 0, 7])
    assert rules.decide(FlowInfo("tcp", client, bytes([192, 0, 2, 1]), None, 443)) == Decision("web", 1)
    assert rules.decide(FlowInfo("udp", client, bytes([192, 0, 2, 1]), None, 443)) == Decision("office", -1)
    assert rules.decide(FlowInfo("udp", client, bytes([203, 0, 113, 1]), None, 443)) == Decision("direct", 2)
    assert rules.decide(FlowInfo("tcp", client, None, "git.corp.example", 443)) == Decision("web", 4)
    assert rules.decide_name("telemetry.example").kind is NameKind.BLOCK


def test_ranges_of_ports_and_sources_reach_the_rules() -> None:
    written = {"port": [80, "8000-8999"], "source_cidr": "10.0.0.0/24", "protocol": ["tcp", "udp"], "outbound": "block"}
    rules = to_rules(parse({"route": {"rules": [written]}}))
    inside, outside = bytes([10, 0, 0, 9]), bytes([10, 0, 1, 9])
    assert rules.decide(FlowInfo("udp", inside, bytes([192, 0, 2, 1]), None, 8500)).outbound == "block"
    assert rules.decide(FlowInfo("udp", outside, bytes([192, 0, 2, 1]), None, 8500)).outbound == "direct"
    assert rules.decide(FlowInfo("udp", inside, bytes([192, 0, 2, 1]), None, 81)).outbound == "direct"


@pytest.mark.parametrize("written", ["52-54-00-12-AB-56", "5254.0012.ab56", ["52:54:00:12:ab:56"]])
def test_mac_addresses_in_their_usual_spellings_reach_the_rules(written: str | list[str]) -> None:
    rules = to_rules(parse({"route": {"rules": [{"source_mac": written, "interface": "eth1", "outbound": "block"}]}}))
    (rule,) = rules.rules
    assert rule.source_mac == (bytes.fromhex("52540012ab56"),)
    assert rule.interface == ("eth1",)


def test_an_interface_may_be_given_on_the_command_line_only() -> None:
    written = {"route": {"rules": [{"interface": "eth1", "outbound": "block"}]}}
    assert parse(written).route.rules[0].interface == ("eth1",)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4096, 4096),
        ("65536", 65536),
        ("10MB", 10_000_000),
        ("10 MiB", 10_485_760),
        ("2gb", 2 * 10**9),
    ],
)
def test_the_size_of_a_log_file_may_have_a_unit(size: object, expected: int) -> None:
    settings = parse({"log": {"rotate": {"size": size}}})
    assert settings.log.rotate is not None
    assert (settings.log.rotate.size, settings.log.rotate.keep) == (expected, 5)


def test_the_log_by_default() -> None:
    log = parse({}).log
    assert (log.level, log.format, log.file) == ("info", "console", None)
    assert log.levels.model_dump(exclude_none=True) == {}
    assert log.rotate is not None
    assert (log.rotate.size, log.rotate.keep) == (10_000_000, 5)
    assert log.repeats is not None
    assert (log.repeats.burst, log.repeats.per_second) == (50, 5)
    assert log.flows is not None
    assert (log.flows.burst, log.flows.per_second) == (200, 20)


def test_null_switches_parts_of_the_log_off() -> None:
    log = parse({"log": {"rotate": None, "repeats": None, "flows": None}}).log
    assert (log.rotate, log.repeats, log.flows) == (None, None, None)
