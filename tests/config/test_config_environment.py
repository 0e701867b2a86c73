"""ZTUN_SECTION__KEY over the file, and --proxy and --lan over both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from ipaddress import ip_network

import pytest
from config_cases import complaints, design, parse

from ztun.config import ConfigError, load, settings_from_proxy


def test_a_variable_goes_before_the_file_and_leaves_its_neighbours() -> None:
    settings = parse(design(), {"ZTUN_TUN__MTU": "9000", "ZTUN_TIMEOUTS__DIAL": "2.5", "ZTUN_CAPTURE__HOST": "true"})
    assert (settings.tun.mtu, settings.tun.name) == (9000, "ztun0")
    assert settings.timeouts.dial == 2.5
    assert settings.capture.host is True
    assert settings.capture.lan == ("eth1",)


def test_variables_reach_every_depth_and_need_no_file() -> None:
    settings = load(None, {"ZTUN_DNS__FAKE_IP__SIZE": "100", "ZTUN_DNS__FAKE_IP__RANGE": "10.200.0.0/24"})
    assert settings.dns.fake_ip.size == 100
    assert settings.dns.fake_ip.range == ip_network("10.200.0.0/24")
    assert str(settings.tun.address) == "10.200.0.1/24"


def test_variables_reach_the_log_of_a_component() -> None:
    environ = {"ZTUN_LOG__LEVELS__STACK": "debug", "ZTUN_LOG__ROTATE__SIZE": "1MB", "ZTUN_LOG__FLOWS": "null"}
    settings = parse({"log": {"levels": {"dns": "error"}, "rotate": {"keep": 2}}}, environ)
    assert settings.log.levels.model_dump(exclude_none=True) == {"dns": "error", "stack": "debug"}
    assert settings.log.rotate is not None
    assert (settings.log.rotate.size, settings.log.rotate.keep) == (1_000_000, 2)
    assert settings.log.flows is None


def test_lists_are_written_with_commas_or_as_json() -> None:
    environ = {"ZTUN_CAPTURE__LAN": "eth1, eth2", "ZTUN_DNS__LISTEN": '["10.0.0.1:53", "[2001:db8::1]:53"]'}
    settings = load(None, environ)
    assert settings.capture.lan == ("eth1", "eth2")
    assert settings.dns.listen == ("10.0.0.1:53", "[2001:db8::1]:53")
    assert parse(design(), {"ZTUN_CAPTURE__LAN": ""}).capture.lan == ()


def test_elements_of_a_list_are_reached_by_their_place() -> None:
    settings = parse(design(), {"ZTUN_OUTBOUNDS__0__PASSWORD": "12345", "ZTUN_ROUTE__RULES__1__PORT": "8443,9000-9999"})
    assert settings.outbounds[0].password is not None
    assert settings.outbounds[0].password.get_secret_value() == "12345"
    assert settings.outbounds[0].tag == "office"
    assert settings.route.rules[1].port == ((8443, 8443), (9000, 9999))


def test_a_whole_section_is_json_and_single_keys_go_before_it() -> None:
    environ = {
        "ZTUN_OUTBOUNDS": json.dumps([{"tag": "web", "type": "http", "server": "h:1"}]),
        "ZTUN_ROUTE": '{"default": "block"}',
        "ZTUN_ROUTE__DEFAULT": "web",
    }
    settings = parse({"route": {"rules": [{"domain": "a", "outbound": "direct"}]}}, environ)
    assert settings.outbounds[0].tag == "web"
    assert settings.route.default == "web"
    assert settings.route.rules == ()


def test_nothing_is_written_as_null_or_empty() -> None:
    environ = {"ZTUN_DNS__FAKE_IP__STORE": "", "ZTUN_TUN__ADDRESS6": "null"}
    settings = load(None, environ)
    assert settings.dns.fake_ip.store is None
    assert settings.tun.address6 is None
    assert settings.dns.fake_ip.range6 is None


def test_a_password_of_digits_or_null_is_a_password() -> None:
    settings = parse(design(), {"ZTUN_OUTBOUNDS__0__PASSWORD": "null", "ZTUN_OUTBOUNDS__0__USERNAME": "7"})
    assert settings.outbounds[0].password is not None
    assert settings.outbounds[0].password.get_secret_value() == "null"
    assert settings.outbounds[0].username == "7"


def test_variables_for_other_purposes_are_left_alone() -> None:
    assert complaints({}, {"ZTUN_BPF_DIRECTORY": "/x", "ZTUN": "1", "XZTUN_TUN__MTU": "x", "PATH": "/bin"}) == []


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("ZTUN_TUN__MTU", "big", "ZTUN_TUN__MTU: must be a whole number, not 'big'"),
        ("ZTUN_TUN__MTU", "5", "ZTUN_TUN__MTU: must be at least 576, not 5"),
        ("ZTUN_TUN__MUT", "5", "ZTUN_TUN__MUT: 'mut': unknown key; did you mean 'mtu'?"),
        ("ZTUN_TUNN__MTU", "5", "ZTUN_TUNN__MTU: 'tunn': unknown key; did you mean 'tun'?"),
        ("ZTUN_TUN__MTU__X", "5", "ZTUN_TUN__MTU__X: 'x': is below a single value; leave it out"),
        ("ZTUN_TUN__", "5", "ZTUN_TUN__: '': unknown key; known here: name, mtu, address, address6"),
        ("ZTUN_CAPTURE__HOST", "yes", "ZTUN_CAPTURE__HOST: must be true or false, not 'yes'"),
        ("ZTUN_CAPTURE__LAN", "eth1,a b",
            "ZTUN_CAPTURE__LAN[1]: 'a b' is not an interface name (1 to 15 bytes, no space, '/' or ':')"),
        ("ZTUN_CAPTURE__LAN", "[eth1", "ZTUN_CAPTURE__LAN: column 2: not JSON: expecting value"),
        ("ZTUN_OUTBOUNDS", '[{"tag": "a", "type": "x", "server": "h:1"}]',
            "ZTUN_OUTBOUNDS[0].type: must be 'socks5' or 'http', not 'x'"),
        ("ZTUN_OUTBOUNDS__3__TAG", "x", "ZTUN_OUTBOUNDS__3__TAG: there is no element 3 to set"),
        ("ZTUN_OUTBOUNDS__TAG", "x", "ZTUN_OUTBOUNDS__TAG: 'tag': must be the place in the list, from 0"),
        ("ZTUN_ROUTE__DEFAULT", "x",
            "ZTUN_ROUTE__DEFAULT: no outbound has the tag 'x'; known: direct, block, dns"),
        ("ZTUN_LOG", "debug", "ZTUN_LOG: column 1: not JSON: expecting value"),
        ("ZTUN_LOG", "5", "ZTUN_LOG: must be an object, not 5"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_variable(variable: str, value: str, line: str) -> None:
    assert complaints({}, {variable: value}) == [f"environment: {line}"]


def test_a_proxy_on_the_command_line_takes_everything() -> None:
    settings = settings_from_proxy("socks5://user:p%40ss@[2001:db8::1]:1080", ["eth1", "eth2"])
    (proxy,) = settings.outbounds
    assert (proxy.tag, proxy.type, proxy.host, proxy.port) == ("proxy", "socks5", "2001:db8::1", 1080)
    assert proxy.username == "user"
    assert proxy.password is not None
    assert proxy.password.get_secret_value() == "p@ss"
    assert settings.route.default == "proxy"
    assert settings.capture.lan == ("eth1", "eth2")


def test_the_host_on_the_command_line_needs_no_lan() -> None:
    settings = load(None, {}, proxy="socks5://127.0.0.1:1080", host=True)
    assert (settings.capture.host, settings.capture.lan) == (True, ())
    assert load(None, {"ZTUN_CAPTURE__HOST": "false"}, host=True).capture.host is True
    assert load(None, {"ZTUN_CAPTURE__HOST": "true"}).capture.host is True
    assert load(None, {}).capture.host is False


@pytest.mark.parametrize(
    ("url", "kind", "server"),
    [
        ("socks5h://127.0.0.1:1080", "socks5", "127.0.0.1:1080"),
        ("HTTP://proxy.corp.example:3128/", "http", "proxy.corp.example:3128"),
    ],
)
def test_the_scheme_says_what_kind_of_proxy_it_is(url: str, kind: str, server: str) -> None:
    (proxy,) = settings_from_proxy(url, []).outbounds
    assert (proxy.type, proxy.server, proxy.username, proxy.password) == (kind, server, None, None)


def test_the_command_line_goes_before_environment_and_file() -> None:
    environ = {"ZTUN_CAPTURE__LAN": "eth7", "ZTUN_ROUTE__DEFAULT": "block", "ZTUN_TUN__MTU": "1400"}
    settings = settings_from_proxy("http://10.1.1.1:3128", ["eth1"], environ)
    assert settings.capture.lan == ("eth1",)
    assert settings.route.default == "proxy"
    assert settings.tun.mtu == 1400


def said(url: str, lan: Sequence[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings_from_proxy(url, lan)
    return str(caught.value).split("\n")


HOW = "write socks5://host:port or http://host:port, with user:password@ if need be"


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("10.1.1.1:1080", HOW),
        ("socks4://10.1.1.1:1080", f"'socks4' is not a known scheme; {HOW}"),
        ("socks5://10.1.1.1", "must end in host:port, with an IPv6 address in brackets"),
        ("socks5://2001:db8::1:1080", "must end in host:port, with an IPv6 address in brackets"),
        ("socks5://user:hunter2", "must end in host:port, with an IPv6 address in brackets"),
        ("socks5://[::1:1080", "is not a URL: check the brackets of the address"),
        ("http://user:hun/ter2@h:1",
            "takes no path; in a user name or password, / ? # @ and : are written as %2F %3F %23 %40 %3A"),
        ("socks5://user@h:1", "password: must have 1 to 255 bytes for SOCKS5 (RFC 1929 section 2)"),
    ],
)  # fmt: skip
def test_a_bad_proxy_url_is_explained_without_repeating_it(url: str, line: str) -> None:
    assert said(url) == [f"--proxy: {line}"]


def test_a_bad_interface_on_the_command_line_is_said_beside_a_bad_proxy() -> None:
    assert said("x://", ["e th"]) == [
        f"--proxy: 'x' is not a known scheme; {HOW}",
        "--lan: 'e th' is not an interface name (1 to 15 bytes, no space, '/' or ':')",
    ]


def test_a_tag_of_the_file_that_the_proxy_needs_is_said() -> None:
    environ = {"ZTUN_OUTBOUNDS": '[{"tag": "proxy", "type": "http", "server": "h:1"}]'}
    with pytest.raises(ConfigError, match=r"^--proxy: tag: the tag 'proxy' is already that of outbounds\[0\]"):
        settings_from_proxy("http://h:2", [], environ)
