"""A lab whose gateway runs ztun's macOS part on a stand-in for macOS: see as_darwin.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import BASE

from ztun.lab import Lab, Ztun
from ztun.lab.namespace import Namespace
from ztun.lab.ztun import complete

UTUN = "utun7"
_TESTS = Path(__file__).resolve().parent.parent


class ZtunAsDarwin(Ztun):
    """`ztun` as it would run on macOS, in the gateway's namespace."""

    def __init__(self, gateway: Namespace, directory: Path) -> None:
        super().__init__(gateway, directory)
        self.resolver = directory / "resolver"
        self.saved = directory / "saved"
        self.claims = directory.parent / "claims"  # of all instances in the lab
        self.trace_path = directory / "trace.json"
        self.saved.mkdir()

    def launch(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        with self._output.open("ab") as output:
            self._process = self._gateway.spawn(
                sys.executable, "-m", "darwin.as_darwin", *arguments,
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment(),
            )  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(_TESTS),
            "ZTUN_TEST_RESOLVER": str(self.resolver),
            "ZTUN_TEST_RUN": str(self.saved),
            "ZTUN_TEST_CLAIMS": str(self.claims),
            "ZTUN_TEST_TRACE": str(self.trace_path),
        }

    def command(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        argv = (sys.executable, "-m", "darwin.as_darwin", *arguments)
        return self._gateway.run(*argv, check=check, env=self.environment(), **options)

    def trace(self) -> dict[str, Any]:
        """What was asked of the stand-in, once it has ended."""
        found: dict[str, Any] = json.loads(self.trace_path.read_text())
        return found


class DarwinLab(Lab):
    """The laboratory with ZtunAsDarwin in the gateway."""

    def ztun(self, config: dict[str, Any] | None = None, **options: Any) -> ZtunAsDarwin:
        instance = self.prepare()
        merged = complete({"tun": {"name": UTUN}, **(config or {})}, instance.directory)
        instance.start(merged, **options)
        return instance

    def prepare(self) -> ZtunAsDarwin:
        instance = ZtunAsDarwin(self.gateway, self.directory / f"ztun-{len(self._ztuns)}")
        self._ztuns.append(instance)
        return instance


@pytest.fixture(scope="module")
def lab() -> Iterator[DarwinLab]:
    with DarwinLab() as made:
        yield made


@pytest.fixture(scope="module")
def ztun(lab: DarwinLab) -> ZtunAsDarwin:
    """A gateway on the rules of the end-to-end tests."""
    return lab.ztun(BASE)


@pytest.fixture
def any_ztun(ztun: ZtunAsDarwin) -> ZtunAsDarwin:
    return ztun
