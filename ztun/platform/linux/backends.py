"""Choosing how to capture: TCX, clsact filters, or routes alone. See docs/backends.md."""

from __future__ import annotations

from functools import partial

import structlog

from ztun.errors import ConfigError, ZtunError
from ztun.platform.linux import layout, loader, offload, xdp
from ztun.platform.linux.bpfcall import has_tcx
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.classifier import MAPS, PROGRAMS, BpfClassifier
from ztun.platform.linux.hooks import ClsactHook, TcxHook
from ztun.platform.linux.host import MakeHook
from ztun.platform.linux.loader import Objects
from ztun.platform.linux.mixed import MixedClassifier
from ztun.platform.linux.netlink import NetlinkError, explain
from ztun.platform.linux.policy import RoutesClassifier

log = structlog.get_logger("ztun.classifier")

BACKENDS = ("auto", "bpf", "tcx", "clsact", "routes")

Chosen = BpfClassifier | MixedClassifier | RoutesClassifier


async def choose(backend: str, capture: Capture) -> Chosen:
    """Make the classifier that `capture.backend` asks for; "auto" takes the best that works here and says why.

    Raises ZtunError when what was asked for cannot be had.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"capture.backend: {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "routes":
        return RoutesClassifier(capture)
    try:
        classifier = await _load(backend, capture)
    except ConfigError:
        raise
    except ZtunError as error:
        if backend != "auto":
            raise
        log.warning("no BPF: capturing with routes alone", reason=str(error))
        by_routes = RoutesClassifier(capture)
        by_routes.fallback_reason = str(error)
        return by_routes
    if classifier.fallback_reason:
        log.info("capturing with clsact filters", reason=classifier.fallback_reason)
    return MixedClassifier(classifier, capture) if backend == "auto" else classifier


async def _load(backend: str, capture: Capture) -> BpfClassifier:
    programs = {xdp.PROGRAM: xdp.label(capture.device)} if capture.xdp else {}
    maps, optional = {**MAPS, **xdp.MAPS}, offload.PROGRAMS if capture.offload else ()
    if capture.offload:
        maps |= offload.MAPS
    objects = await loader.load(layout.find_sources(), PROGRAMS, maps, programs, optional)
    if xdp.PROGRAM in objects.refused:
        log.warning("no XDP, tc drops alone", reason=objects.refused[xdp.PROGRAM])
    try:
        hook, reason = _choose_hook(backend, objects, capture)
        make_hook: MakeHook = partial(ClsactHook, device=capture.device) if hook == "clsact" else TcxHook
        classifier = BpfClassifier(objects, hook, make_hook, capture, lenient=backend == "auto")
    except OSError as error:
        objects.close()
        raise ZtunError(f"BPF maps cannot be used: {error.strerror}") from error
    except BaseException:
        objects.close()
        raise
    classifier.fallback_reason = reason
    return classifier


def _choose_hook(backend: str, objects: Objects, capture: Capture) -> tuple[str, str | None]:
    """("tcx" or "clsact", why not the first choice). Raises ZtunError when there is none of what was asked for."""
    reason = _why_not_tcx(backend, objects, capture)
    if reason is None:
        return "tcx", None
    if backend == "tcx":
        raise ZtunError(f"{reason}: set capture.backend to auto")
    if refusal := _try("clsact", objects, capture):
        reasons = [refusal] if backend == "clsact" else [reason, refusal]
        raise ZtunError("; ".join(reasons))
    return "clsact", None if backend == "clsact" else reason


def _why_not_tcx(backend: str, objects: Objects, capture: Capture) -> str | None:
    """None when TCX it is."""
    if backend == "clsact":
        return "asked for"
    if not has_tcx(objects.programs["reply"]):
        return "this kernel has no TCX (Linux 6.6)"
    if capture.fail_closed and backend != "tcx":
        return "fail is closed, and a TCX link would not outlive a killed process"
    return _try("tcx", objects, capture)


def _try(hook: str, objects: Objects, capture: Capture) -> str | None:
    """Attach to our own TUN and detach: the one way to know whether the kernel lets us. None when it does."""
    program, device = objects.programs["reply"], capture.device
    try:
        made = TcxHook("reply", program, device) if hook == "tcx" else ClsactHook("reply", program, device, device)
        made.close()
    except NetlinkError as error:
        return f"this kernel takes no BPF filter on {hook}: {explain(error)}"
    except OSError as error:
        return f"this kernel takes no BPF program on {hook}: {error.strerror}"
    return None
