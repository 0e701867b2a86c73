"""With few capabilities, as root and as another user: what is needed when, and that nothing more is left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from open_to_all import OPEN_TO_ALL

from e2e.conftest import BASE
from e2e.traffic import start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import complete

USER = 61234  # nobody's
FULL = ("net_admin", "net_bind_service", "bpf", "perfmon")
KEPT = {"CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"}
BACKENDS = pytest.mark.parametrize("backend", ["tcx", "clsact", "routes"])


def as_user(lab: Lab, capabilities: tuple[str, ...], config: dict[str, Any]) -> Ztun:
    """An instance of USER with these capabilities, not started yet."""
    lab.stop()
    instance = lab.prepare()
    instance.write(complete({**BASE, **config}, instance.directory))
    for path in (instance.directory, instance.config_path):
        os.chown(path, USER, USER)
    added = ",".join(f"+{name}" for name in capabilities)
    instance.wrapper = (
        *OPEN_TO_ALL,
        *("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"),
        *("--inh-caps", f"-all,{added}", "--ambient-caps", added),
    )
    instance.launch("up", "--config", str(instance.config_path))
    return instance


def refusal(instance: Ztun) -> str:
    """The one line that an instance ends with which does not start, after warnings."""
    assert wait_until(lambda: not instance.alive, 15)
    assert instance.returncode in (1, 2)
    [line] = [line for line in instance.output.splitlines() if " warning " not in line]
    return line


def threads_of(pid: int) -> dict[str, set[str]]:
    """Set of capabilities -> its values over all threads."""
    found: dict[str, set[str]] = {}
    for path in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(FileNotFoundError):  # a helper that ended
            for line in path.read_text().splitlines():
                name, _, value = line.partition(":\t")
                if name.startswith("Cap") or name == "NoNewPrivs":
                    found.setdefault(name, set()).add(value)
    return found


def seen_as(lab: Lab, address: str = plan.SITE4) -> str | None:
    done = lab.curl(f"http://{address}/", check=False, timeout=2)
    return None if done.returncode else str(json.loads(done.stdout)["client"])


def goes_on(lab: Lab, instance: Ztun, backend: str) -> None:
    """What asks for rights after the start: all of it still works."""
    assert instance.status()["backend"] == backend
    attached = programs(instance)
    assert seen_as(lab) == plan.UPSTREAM4
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)  # a store write, map updates
    assert seen_as(lab, f"[{plan.DIRECT6}]") == plan.CLIENT6

    lab.gateway.ip("link del ztun0")  # another TUN, its addresses, routes and sysctls, programs attached to it
    assert wait_until(lambda: seen_as(lab) == plan.UPSTREAM4)
    assert lab.page(f"http://[{plan.SITE6}]/")["client"] == plan.UPSTREAM6

    lab.gateway.ip("link set lan0 name lan9")  # programs attached to what appeared
    assert wait_until(lambda: seen_as(lab) == plan.CLIENT4)
    lab.gateway.ip("link set lan9 name lan0")
    assert wait_until(lambda: "capturing from an interface that appeared" in instance.output)
    assert wait_until(lambda: seen_as(lab) == plan.UPSTREAM4)

    lab.gateway.ip("address add 10.10.0.9/24 dev lan0", f"address add {plan.SITE4}/32 dev lan0")  # own addresses
    assert wait_until(lambda: verdict_of(instance, f"{plan.SITE4}/32") == "direct")
    lab.gateway.ip("address del 10.10.0.9/24 dev lan0", f"address del {plan.SITE4}/32 dev lan0")
    assert wait_until(lambda: seen_as(lab) == plan.UPSTREAM4)
    assert wait_until(lambda: programs(instance) == attached), (programs(instance), attached)


def programs(instance: Ztun) -> set[tuple[str, str, str]]:
    """What is attached where: tc and XDP."""
    return {(each["name"], each["hook"], each["ifname"]) for each in instance.routes()["programs"]}


def verdict_of(instance: Ztun, prefix: str) -> str | None:
    entries = [entry for table in instance.routes()["maps"] for entry in table["entries"]]
    return next((entry["verdict"] for entry in entries if entry.get("prefix") == prefix), None)


@BACKENDS
def test_root_keeps_two_capabilities_and_goes_on_with_them(lab: Lab, backend: str) -> None:
    lab.stop()
    before = snapshot(lab.gateway)
    instance = start(lab, {**BASE, "capture": {"backend": backend}})

    assert set(instance.status()["privileges"]["capabilities"]) == KEPT
    shown = instance.command("status", "--socket", str(instance.socket_path)).stdout
    assert "rights user 0, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN" in shown
    # In every thread, none left for programs that it would run, and no way to others.
    kept = f"{1 << 12 | 1 << 10:016x}"
    nothing = {"CapInh": {"0" * 16}, "CapBnd": {"0" * 16}, "CapAmb": {"0" * 16}, "NoNewPrivs": {"1"}}
    assert threads_of(instance.pid) == {"CapPrm": {kept}, "CapEff": {kept}, **nothing}

    goes_on(lab, instance, backend)
    assert threads_of(instance.pid)["CapPrm"] == {kept}
    assert instance.stop() == 0
    assert differences(before, snapshot(lab.gateway)) == []
    assert "not detached" not in instance.output


@pytest.mark.parametrize("backend", ["tcx", "routes"])
def test_a_user_with_four_capabilities_is_enough(lab: Lab, backend: str) -> None:
    instance = as_user(lab, FULL, {"capture": {"backend": backend}})
    instance.wait_ready()
    assert instance.status()["privileges"] == {
        "user": USER, "capabilities": ["CAP_NET_BIND_SERVICE", "CAP_NET_ADMIN"], "no_new_privileges": True,
    }  # fmt: skip
    goes_on(lab, instance, backend)
    assert instance.stop() == 0
    assert "Traceback" not in instance.output


def test_with_a_fifth_the_kernel_carries_connections(lab: Lab) -> None:
    """It is for raw sockets that stay open: nothing of it is left either."""
    instance = as_user(lab, (*FULL, "net_raw"), {"capture": {"backend": "tcx"}})
    instance.wait_ready()
    assert set(instance.status()["privileges"]["capabilities"]) == KEPT
    goes_on(lab, instance, "tcx")
    carried = instance.status()["tcp"]["offloaded_total"]
    assert carried > 0
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        assert instance.stop() == 0  # both ends are told, by a raw socket and through the TUN
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert "Traceback" not in instance.output


def test_without_raw_sockets_ztun_carries_them_and_says_so(lab: Lab) -> None:
    instance = as_user(lab, FULL, {"capture": {"backend": "tcx"}})
    instance.wait_ready()
    assert seen_as(lab) == plan.UPSTREAM4
    assert instance.status()["tcp"]["offloaded_total"] == 0
    assert "raw sockets take CAP_NET_RAW" in instance.output


def test_without_the_right_to_load_bpf_it_captures_by_routes(lab: Lab) -> None:
    instance = as_user(lab, ("net_admin", "net_bind_service"), {})
    instance.wait_ready()
    status = instance.status()
    assert status["backend"] == "routes"
    assert "needs root, or CAP_BPF" in status["fallback_reason"]
    assert seen_as(lab) == plan.UPSTREAM4


def test_without_it_bpf_by_name_is_refused(lab: Lab) -> None:
    instance = as_user(lab, ("net_admin", "net_bind_service"), {"capture": {"backend": "bpf"}})
    assert "needs root, or CAP_BPF" in refusal(instance)


def test_without_the_right_to_low_ports_a_listener_is_refused(lab: Lab) -> None:
    said = refusal(as_user(lab, ("net_admin", "bpf", "perfmon"), {}))
    assert "dns.listen[0]" in said
    assert "CAP_NET_BIND_SERVICE" in said


def test_without_the_right_to_change_the_network_it_does_not_start(lab: Lab) -> None:
    assert "CAP_NET_ADMIN" in refusal(as_user(lab, ("net_bind_service", "bpf"), {}))


def test_a_place_that_is_not_its_own_is_named(lab: Lab) -> None:
    said = refusal(as_user(lab, FULL, {"control": {"socket": "/run/ztun-test/control.sock"}}))
    assert "/run/ztun-test/control.sock" in said
    assert "control.socket" in said


def test_root_can_still_write_where_it_is_not_the_owner(lab: Lab) -> None:
    """The log in the directory of somebody: kept for that is what it takes, and said."""
    directory = lab.directory / "theirs"
    directory.mkdir(mode=0o755)
    os.chown(directory, USER, USER)
    file = directory / "log"
    instance = start(lab, {**BASE, "log": {"file": str(file)}})
    assert set(instance.status()["privileges"]["capabilities"]) == {"CAP_DAC_OVERRIDE", *KEPT}
    assert "a capability is needed to the end" in file.read_text()

    file.rename(directory / "log.1")
    os.kill(instance.pid, 1)
    assert wait_until(file.exists)


_TRIAL = """
import asyncio
from ztun import privileges

async def main():
    def trial():
        return "a kernel that asks" if not privileges.has(privileges.BPF) else None
    needed = await privileges.give_up([privileges.NET_ADMIN], [(privileges.BPF, trial)])
    print(needed, privileges.describe()["capabilities"], privileges.threads_with_more_than(1 << 39 | 1 << 12))

asyncio.run(main())
"""


def test_what_fails_without_a_capability_keeps_it() -> None:
    done = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[(39, 'a kernel that asks')] ['CAP_NET_ADMIN', 'CAP_BPF'] []"


def test_a_configuration_for_everybody_is_warned_about_or_refused(lab: Lab) -> None:
    instance = lab.prepare()
    instance.write(complete(BASE, instance.directory))
    instance.config_path.chmod(0o644)
    checked = instance.command("check", str(instance.config_path))
    assert "ztun: warning:" in checked.stderr
    assert "everybody can read passwords of " in checked.stderr

    lab.stop()
    instance.launch("up", "--config", str(instance.config_path))
    instance.wait_ready()
    assert "the configuration file is not private" in instance.output
    assert instance.stop() == 0

    instance.config_path.chmod(0o666)
    for command in (("check", str(instance.config_path)), ("up", "--config", str(instance.config_path))):
        refused = instance.command(*command, check=False)
        assert refused.returncode == 2
        assert "everybody can change it (mode 0666)" in refused.stderr
