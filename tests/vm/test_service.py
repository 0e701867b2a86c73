"""ztun as a service of the machine: what the unit made of it, and whether it comes back."""

from __future__ import annotations

import pytest

from vm.guest import Guest, wait_for
from vm.traffic import ITSELF, PROXY, dig, page, seen
from ztun.lab import plan

_TCX_SINCE = (6, 6)
# linux/capability.h: NET_BIND_SERVICE, NET_ADMIN, NET_RAW, PERFMON, BPF.
_ALLOWED = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 38 | 1 << 39


def is_up(gateway: Guest) -> bool:
    """Type=notify: active means that ztun has said that it is ready."""
    return gateway.read("systemctl is-active ztun", check=False) == "active"


def main_pid(gateway: Guest) -> int:
    pid = int(gateway.read("systemctl show --property MainPID --value ztun"))
    assert pid > 0, "it does not run"
    return pid


@pytest.mark.smoke
class TestTheUnit:
    def test_it_is_up_after_one_start_and_enabled(self, gateway: Guest) -> None:
        assert is_up(gateway)
        assert gateway.read("systemctl is-enabled ztun") == "enabled"
        assert gateway.read("systemctl show --property NRestarts --value ztun") == "0"
        assert gateway.json("ztun status --json")["state"] == "running"

    def test_the_best_backend_of_this_kernel_was_taken(self, gateway: Guest) -> None:
        release = gateway.read("uname -r")
        version = tuple(int(part) for part in release.split(".")[:2])
        expected = "tcx" if version >= _TCX_SINCE else "clsact"
        assert gateway.json("ztun routes --json")["backend"] == expected, release

    def test_it_is_not_root_and_may_do_little(self, gateway: Guest) -> None:
        pid = main_pid(gateway)
        assert gateway.read(f"stat -c %u /proc/{pid}") != "0"
        lines = gateway.read(f"cat /proc/{pid}/status").splitlines()
        fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert int(fields[kind], 16) & ~_ALLOWED == 0, (kind, fields[kind])
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"

    def test_nothing_in_the_journal_is_worth_a_complaint(self, gateway: Guest) -> None:
        invocation = gateway.read("systemctl show --property InvocationID --value ztun")
        journal = gateway.read(f"journalctl --no-pager --output cat _SYSTEMD_INVOCATION_ID={invocation}")
        assert " is up, pid " in journal
        said = [line for line in journal.splitlines() if line.startswith(("warning", "error", "Traceback"))]
        assert said == []


def test_after_a_reboot_it_is_there_again(client: Guest, gateway: Guest) -> None:
    before = dig(client, "persistent.bulk.test")

    gateway.reboot()

    assert wait_for(lambda: is_up(gateway)), gateway.read("systemctl status ztun", check=False)
    assert gateway.read("systemctl show --property NRestarts --value ztun") == "0"
    assert page(client, f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    assert page(client, f"http://[{plan.SITE6}]/")["client"] == plan.UPSTREAM6
    assert page(client, "http://direct.test/")["client"] in ITSELF
    assert dig(client, "persistent.bulk.test") == before, "names keep their Fake-IPs: clients have them in their caches"
    assert page(client, "http://persistent.bulk.test/")["client"] in PROXY


class TestKilled:
    """SIGKILL, and a service manager that starts it again (Restart=on-failure)."""

    def test_direct_traffic_and_the_host_lose_nothing(self, client: Guest, gateway: Guest) -> None:
        pinging = "ping -i 0.2 -c 60 -W 30 -q {} > /tmp/{}.ping 2>&1 &"
        client.run(f"{pinging.format(plan.DIRECT4, 'v4')} {pinging.format(plan.DIRECT6, 'v6')}")
        gateway.run(pinging.format(plan.UPSTREAM4, "host"))
        pid = main_pid(gateway)

        gateway.run(f"kill -KILL {pid}")

        for guest, name in ((client, "v4"), (client, "v6"), (gateway, "host")):
            told = guest.read(f"while ! grep transmitted /tmp/{name}.ping; do sleep 1; done")
            assert "60 received" in told, (name, told)
        assert wait_for(lambda: is_up(gateway) and main_pid(gateway) != pid), gateway.read("systemctl status ztun")

    def test_what_would_be_tunnelled_passes_until_it_is_back(self, client: Guest, gateway: Guest) -> None:
        url = f"http://{plan.SITE4}/"
        assert page(client, url)["client"] == plan.UPSTREAM4
        _restart_after(gateway, 20)  # time to look
        gateway.run(f"kill -KILL {main_pid(gateway)}")

        assert wait_for(lambda: seen(client, url) == plan.CLIENT4, interval=0), "nobody carries it, so it goes direct"
        assert wait_for(lambda: is_up(gateway)), gateway.read("systemctl status ztun", check=False)
        assert wait_for(lambda: seen(client, url) == plan.UPSTREAM4)
        assert int(gateway.read("systemctl show --property NRestarts --value ztun")) >= 1
        _restart_after(gateway, 2)


def test_stopped_it_leaves_nothing_and_the_gateway_just_routes(client: Guest, gateway: Guest) -> None:
    gateway.run("systemctl stop ztun")
    try:
        assert page(client, f"http://{plan.SITE4}/")["client"] == plan.CLIENT4
        for command in ("tc filter show dev lan0 ingress", "bpftool net", "ip -4 rule", "ip -6 rule", "ip link"):
            assert "ztun" not in gateway.read(command), command
        assert gateway.json("bpftool -j prog show name capture", check=False) in (None, [])
        assert gateway.run("test -e /run/ztun/control.sock", check=False).returncode == 1
    finally:
        gateway.run("systemctl start ztun")
    assert page(client, f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4


@pytest.mark.parametrize("command", ["networkctl reload", "systemctl restart systemd-networkd"])
def test_the_machines_own_network_service_takes_nothing_away(client: Guest, gateway: Guest, command: str) -> None:
    """systemd-networkd removes routes and rules that it does not know, where it thinks them its business."""
    before = gateway.json("ztun routes --json")
    gateway.run(command)
    gateway.run("/lib/systemd/systemd-networkd-wait-online --interface=lan0 --interface=wan0 --timeout=120")
    assert page(client, f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    assert page(client, "http://site.test/")["client"] in PROXY
    after = gateway.json("ztun routes --json")
    assert [after[key] for key in ("backend", "routes", "ip_rules", "programs")] == [
        before[key] for key in ("backend", "routes", "ip_rules", "programs")
    ]


def _restart_after(gateway: Guest, seconds: int) -> None:
    drop_in = "/run/systemd/system/ztun.service.d"
    gateway.run(f"mkdir -p {drop_in}; printf '[Service]\\nRestartSec={seconds}\\n' > {drop_in}/test.conf")
    gateway.run("systemctl daemon-reload")
