"""The machines of a run, one after the other for each image of the gateway. Started through vagrant/world.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import pytest

from vm.guest import Guest, Machines
from vm.logs import collect
from vm.qemu import Qemu
from vm.vagrant import Vagrant

_LONGEST = 2400  # seconds for one test, bringing machines up included


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--machines", choices=["qemu", "vagrant"], default="qemu", help="who runs the virtual machines")
    parser.addoption("--gateways", default="bookworm", help="images that the gateway is tested on, with commas between")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "smoke: part of `make vm-smoke`")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(_LONGEST))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "image" in metafunc.fixturenames:
        metafunc.parametrize("image", metafunc.config.getoption("--gateways").split(","), scope="session")


@pytest.fixture(scope="session")
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Whoever runs them. At the end their logs are in ZTUN_VM_DIR/logs, and they are destroyed."""
    store, run = Path(os.environ.get("ZTUN_VM_DIR", "/var/tmp/ztun-vm")), Path(os.environ["ZTUN_VM_RUN"])
    made: Machines = Qemu(store, run) if request.config.getoption("--machines") == "qemu" else Vagrant(store, run)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def guests(machines: Machines, image: str) -> Iterator[Mapping[str, Guest]]:
    """All three, provisioned, the gateway running on `image`."""
    try:
        yield machines.up(image)
    finally:
        collect(machines, image)


@pytest.fixture
def client(guests: Mapping[str, Guest]) -> Guest:
    return guests["client"]


@pytest.fixture
def upstream(guests: Mapping[str, Guest]) -> Guest:
    return guests["upstream"]


@pytest.fixture
def gateway(guests: Mapping[str, Guest]) -> Guest:
    return guests["gateway"]


def _end(number: int, _frame: FrameType | None) -> None:
    """Unwind as Ctrl-C does, so that the machines are destroyed and their logs kept."""
    raise KeyboardInterrupt(f"signal {number}")
