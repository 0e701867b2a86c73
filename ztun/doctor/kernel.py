"""What the kernel and the compiler have to offer."""

from __future__ import annotations

from ztun.compiled import is_compiled
from ztun.doctor.finding import Finding, Level, judge, ok, problem, warning
from ztun.doctor.scene import Scene
from ztun.platform import facts


def check_bcc(scene: Scene) -> Finding:
    found = facts.bcc_problem()
    if found is None:
        return ok("bcc", "its Python module is there")
    level = _without_bpf(scene)
    return judge("bcc", level, found, "apt install python3-bpfcc, and a .venv with --system-site-packages")


def check_compiled(scene: Scene) -> Finding:
    if is_compiled():
        return ok("compiled", "what packets pass through is machine code")
    return ok("compiled", "packets meet interpreted code, at one and a half times the cost (docs/compiling.md)")


def check_headers(scene: Scene) -> Finding:
    found = facts.headers_problem()
    if found is None:
        return ok("headers", "the kernel's UAPI headers are there")
    return judge("headers", _without_bpf(scene), found, "apt install linux-libc-dev")


async def check_bpf(scene: Scene) -> Finding:
    found = await scene.load_bpf()
    if found.reason is None:
        return ok("bpf", f"the programs compile and load on Linux {facts.kernel()}")
    remedy = "run this as root; else correct what the line says, or set capture.backend to routes"
    return judge("bpf", _without_bpf(scene), found.reason, remedy)


def _without_bpf(scene: Scene) -> Level:
    """How bad it is to have no BPF."""
    if not scene.wants_bpf:
        return Level.OK
    return Level.WARNING if scene.backend == "auto" else Level.PROBLEM


async def check_tcx(scene: Scene) -> Finding:
    found = (await scene.load_bpf()).tcx
    if found:
        return ok("tcx", "the kernel has TCX links, which vanish with the process")
    if found is None:
        return judge("tcx", Level.WARNING if scene.wants_bpf else Level.OK, "not known without BPF", "see bpf")
    level = Level.PROBLEM if scene.backend == "tcx" else Level.OK
    return judge("tcx", level, "no TCX before Linux 6.6: clsact filters are used", "set capture.backend to auto")


def check_jit(scene: Scene) -> Finding:
    if facts.jit() != "0":
        return ok("bpf-jit", "BPF is compiled to machine code")
    level = Level.WARNING if scene.wants_bpf else Level.OK
    return judge("bpf-jit", level, "BPF is interpreted, at many times the cost", "sysctl -w net.core.bpf_jit_enable=1")


async def check_xdp(scene: Scene) -> Finding:
    found = await scene.load_bpf()
    wanted = scene.wants_bpf and scene.settings.capture.xdp
    if found.xdp:
        return ok("xdp", "the kernel takes our XDP program")
    if not wanted:
        return ok("xdp", "not asked for")
    reason = found.xdp_reason or "not known without BPF"
    return warning("xdp", f"tc alone drops what is blocked: {reason}", "nothing, or capture.xdp: false to hear no more")


def check_tun(scene: Scene) -> Finding:
    found = scene.tun
    if found.reason is None:
        return ok("tun", "the kernel makes TUN devices with segmentation offload")
    return problem("tun", found.reason, "modprobe tun; in a container, hand it /dev/net/tun and CAP_NET_ADMIN")


def check_uso(scene: Scene) -> Finding:
    found = scene.tun
    if found.uso:
        return ok("uso", "the TUN cuts super-datagrams (UDP segmentation offload)")
    if found.uso is None:
        return ok("uso", "could not be tried")
    return ok("uso", "no UDP segmentation offload before Linux 6.2: datagrams are cut in Python")


def check_ipv6(scene: Scene) -> Finding:
    found = facts.ipv6_problem()
    if found is None:
        return ok("ipv6", "this network namespace has IPv6")
    if scene.settings.tun.address6 is None:
        return ok("ipv6", f"off, as in the configuration ({found})")
    remedy = "sysctl -w net.ipv6.conf.all.disable_ipv6=0, or tun.address6: null"
    return warning("ipv6", f"no IPv6: {found}; names get no Fake-IP of that family", remedy)
