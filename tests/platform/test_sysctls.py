"""Settings of the kernel that the routes backend changes, and how they come back."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from lan_world import World

from ztun.platform.linux import sysctl
from ztun.platform.linux.sysctl import Sysctls

KEYS = [
    f"ipv6/conf/{where}/{key}"
    for where in ("all", "default", "lan0", "wan0", "lo")
    for key in ("forwarding", "accept_ra")
]


def write(key: str, value: str) -> None:
    Path("/proc/sys/net", key).write_text(value)


def test_changes_are_put_back_last_first(world: World) -> None:
    settings = Sysctls()
    assert settings.set("ipv4/conf/lan0/rp_filter", "1")
    assert settings.set("ipv4/conf/lan0/rp_filter", "2")
    assert settings.changes() == ["ipv4.conf.lan0.rp_filter = 2"]
    settings.restore()
    assert sysctl.read("ipv4/conf/lan0/rp_filter") == "0"
    write("ipv4/conf/lan0/rp_filter", "1")
    settings.restore()
    assert sysctl.read("ipv4/conf/lan0/rp_filter") == "1"


def test_what_the_kernel_does_not_have_is_not_set(world: World) -> None:
    assert not Sysctls().set("ipv4/conf/nothing/rp_filter", "1")


def test_before_linux_6_17_ipv6_forwarding_is_one_switch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sysctl.read
    monkeypatch.setattr(sysctl, "read", lambda key: None if "force_forwarding" in key else original(key))
    write("ipv6/conf/wan0/accept_ra", "1")  # its default route comes from router advertisements
    write("ipv6/conf/lan0/forwarding", "1")  # one interface's own
    before = {key: sysctl.read(key) for key in KEYS}
    with world.running("routes"):
        assert sysctl.read("ipv6/conf/all/forwarding") == "1"
        assert sysctl.read("ipv6/conf/wan0/accept_ra") == "2"
    assert {key: sysctl.read(key) for key in KEYS} == before


def test_settings_of_an_interface_that_gets_another_name_at_that_moment_are_put_back(world: World) -> None:
    """The kernel tells of the name before it moves the settings to it."""
    key, names = "ipv6/conf/{}/accept_ra", ["lan0", "lan9"]
    index = socket.if_nametoindex("lan0")
    original = sysctl.read(key.format("lan0"))
    for turn in range(60):
        old, new = names[turn % 2], names[1 - turn % 2]
        settings = Sysctls()
        assert settings.set(key.format(old), "2")
        renaming = subprocess.Popen(["ip", "link", "set", old, "name", new])
        while socket.if_indextoname(index) == old:
            pass
        settings.let_go(old, new)
        assert renaming.wait() == 0
        assert sysctl.read(key.format(new)) == original, f"turn {turn}"
