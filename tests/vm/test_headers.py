"""What bcc finds on a machine: kernel headers, none, no modules at all, and not even linux-libc-dev."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vm.guest import Guest
from vm.test_kernel import assert_ip_agrees
from vm.traffic import page
from ztun.lab import plan

_URL = f"http://{plan.SITE4}/"


@contextmanager
def without(gateway: Guest, *paths: str) -> Iterator[None]:
    """ztun is started anew where these are missing, and again when they are back."""
    for path in paths:
        gateway.run(f"mv {path} {path}.away")
    try:
        gateway.run("systemctl restart ztun", timeout=300)
        yield
    finally:
        for path in paths:
            gateway.run(f"mv {path}.away {path}")
        gateway.run("systemctl restart ztun", timeout=300)


def backend(gateway: Guest) -> str:
    return str(gateway.json("ztun routes --json")["backend"])


def test_with_kernel_headers(client: Guest, gateway: Guest) -> None:
    """bcc's own default is /lib/modules/RELEASE/build; here it is there, and ztun needs it not."""
    gateway.run("test -f /lib/modules/$(uname -r)/build/Makefile")
    assert backend(gateway) in ("tcx", "clsact")
    assert page(client, _URL)["client"] == plan.UPSTREAM4


def test_without_kernel_headers_and_modules(client: Guest, gateway: Guest) -> None:
    usual = backend(gateway)
    with without(gateway, "/lib/modules", "/usr/src"):
        assert backend(gateway) == usual
        assert page(client, _URL)["client"] == plan.UPSTREAM4


def test_without_what_bpf_needs_routes_alone_carry_on_and_say_so(client: Guest, gateway: Guest) -> None:
    with without(gateway, "/usr/include"):
        answer = gateway.json("ztun routes --json")
        assert answer["backend"] == "routes"
        assert "linux-libc-dev" in answer["fallback_reason"]
        assert answer["ip_rules"]
        assert_ip_agrees(gateway, answer)
        assert page(client, _URL)["client"] == plan.UPSTREAM4
        assert page(client, f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
    assert backend(gateway) in ("tcx", "clsact")
