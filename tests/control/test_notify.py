"""sd_notify(3) against a real datagram socket, as systemd would open it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ztun.control.notify import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_hears_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"{tmp_path}/notify"
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if abstract else name)
        manager.settimeout(2)
        assert notify("READY=1\nSTATUS=up")
        assert manager.recv(100) == b"READY=1\nSTATUS=up"


@pytest.mark.parametrize("value", ["", "relative/path", "/nonexistent/notify"])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert not notify("READY=1")
