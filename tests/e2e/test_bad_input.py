"""What is wrong is said in one line that names it and the remedy; nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ztun.lab import Lab, plan
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import command, complete


@pytest.fixture(autouse=True)
def untouched(lab: Lab) -> Iterator[None]:
    before = snapshot(lab.gateway)
    yield
    assert differences(before, snapshot(lab.gateway)) == []


def up(lab: Lab, config: dict[str, Any] | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ztun up` on a configuration that it should not start with."""
    instance = lab.prepare()
    text = config if isinstance(config, str) else json.dumps(complete(config, instance.directory))
    instance.config_path.touch(mode=0o600)
    instance.config_path.write_text(text)
    return instance.command("up", "--config", str(instance.config_path), *arguments, check=False, timeout=20)


CONFIGURATIONS: dict[str, tuple[dict[str, Any] | str, tuple[str, ...]]] = {
    "unknown key": ({"tun": {"mtuu": 1500}}, ("mtuu", "tun")),
    "unknown section": ({"tunnel": {}}, ("tunnel",)),
    "ill-typed": ({"tun": {"mtu": "big"}}, ("tun.mtu",)),
    "out of range": ({"tun": {"mtu": 10}}, ("tun.mtu",)),
    "no JSON": ("{", ("config.json",)),
    "missing outbound": (
        {"route": {"rules": [{"domain": ["a.test"], "outbound": "nowhere"}]}},
        ("nowhere", "route.rules"),
    ),
    "missing default outbound": ({"route": {"default": "nowhere"}}, ("nowhere", "route.default")),
    "no condition's value": (
        {"route": {"rules": [{"ip_cidr": ["10.0.0.0/33"], "outbound": "direct"}]}},
        ("10.0.0.0/33",),
    ),
    "duplicate tag": (
        {"outbounds": [{"tag": "a", "type": "http", "server": "10.0.0.1:1"}] * 2},
        ("a", "outbounds"),
    ),
    "address not on any interface": ({"dns": {"listen": ["10.99.0.1:53"]}}, ("10.99.0.1", "dns.listen")),
}


@pytest.mark.parametrize(("config", "words"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_configuration_error_is_one_line_and_exit_code_2(
    lab: Lab, config: dict[str, Any] | str, words: tuple[str, ...]
) -> None:
    done = up(lab, config)

    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_missing_file(lab: Lab) -> None:
    done = lab.gateway.run(*command("up", "--config", "/nowhere.json"), check=False)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "/nowhere.json" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["up", "--proxy", "gopher://10.0.0.1:1"], "gopher"),
        (["up", "--proxy", "socks5://10.0.0.1"], "--proxy"),
        (["up", "--bogus"], "--bogus"),
        (["upp"], "upp"),
    ],
)
def test_usage_error_is_one_line_and_exit_code_2(lab: Lab, arguments: list[str], word: str) -> None:
    done = lab.gateway.run(*command(*arguments), check=False)

    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert word in done.stderr


def test_environment_is_checked_like_the_file(lab: Lab) -> None:
    instance = lab.prepare()
    instance.write(complete({}, instance.directory))
    env = {**os.environ, "ZTUN_TUN__MTU": "huge"}
    done = instance.command("up", "--config", str(instance.config_path), check=False, env=env)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "ZTUN_TUN__MTU" in done.stderr


@pytest.mark.parametrize("type", ["udp", "tcp"])
def test_taken_port_is_a_runtime_error_that_names_it(lab: Lab, type: str) -> None:
    import socket

    kind = socket.SOCK_DGRAM if type == "udp" else socket.SOCK_STREAM
    with lab.gateway.socket(socket.AF_INET, kind) as taken:
        taken.bind((plan.GATEWAY_LAN4, 53))
        if type == "tcp":
            taken.listen()
        done = up(lab, {})

    assert done.returncode == 1, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{plan.GATEWAY_LAN4}:53" in done.stderr


def test_taken_device_name_is_a_runtime_error_that_names_it(lab: Lab) -> None:
    lab.gateway.ip("link add taken0 type veth peer name taken1")
    try:
        done = up(lab, {"tun": {"name": "taken0"}})
    finally:
        lab.gateway.ip("link del taken0")

    assert done.returncode in (1, 2), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "taken0" in done.stderr


def test_without_root_it_says_so(lab: Lab) -> None:
    instance = lab.prepare()
    instance.write(complete({}, instance.directory))
    instance.directory.chmod(0o777)
    os.chown(instance.config_path, 65534, 65534)
    # It may read everything, since the repository may lie below /root; the rest of root's power is gone.
    power = [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *power]

    done = lab.gateway.run(*nobody, *command("up", "--config", str(instance.config_path)), check=False)

    assert done.returncode == 1, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "root" in done.stderr


def test_check_says_the_same_as_up(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"tun": {"mtuu": 1}}')

    done = lab.gateway.run(*command("check", str(path)), check=False)

    assert done.returncode == 2
    assert "mtuu" in done.stderr + done.stdout
