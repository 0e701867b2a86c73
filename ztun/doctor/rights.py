"""What this process may do, and how much of it."""

from __future__ import annotations

import os
import resource

from ztun import machine, privileges
from ztun.doctor.finding import Finding, Level, judge, ok, problem, warning
from ztun.doctor.scene import Scene

_FEW_FILES = 1024
_SYS_ADMIN = 21  # holds all that BPF needs, and before Linux 5.8 is what it needs


def check_capabilities(scene: Scene) -> Finding:
    needed = [privileges.NET_ADMIN]
    if any(machine.parse_endpoint(text)[1] < 1024 for text in scene.listen()):
        needed.append(privileges.NET_BIND_SERVICE)
    missing = [privileges.name(one) for one in needed if not privileges.has(one)]
    remedy = "run it as root, or by packaging/ztun.service"
    if missing:
        return problem("capabilities", f"this user ({os.geteuid()}) lacks {', '.join(missing)}", remedy)
    for_bpf = () if privileges.has(_SYS_ADMIN) else (privileges.BPF, privileges.PERFMON)
    lacking = [privileges.name(one) for one in for_bpf if not privileges.has(one)]
    if lacking and scene.wants_bpf:
        level = Level.WARNING if scene.backend == "auto" else Level.PROBLEM
        return judge("capabilities", level, f"no {', '.join(lacking)}: no BPF", remedy)
    return ok("capabilities", "this user may change the network and load BPF")


def check_open_files(scene: Scene) -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = scene.settings.limits.tcp_flows + scene.settings.limits.udp_sessions
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return ok("open-files", f"room for {wanted} flows")
    remedy = "LimitNOFILE=1048576 in the unit, or ulimit -Hn 1048576"
    detail = f"at most {hard} open files, and limits allow {wanted} flows"
    return problem("open-files", detail, remedy) if hard < _FEW_FILES else warning("open-files", detail, remedy)
