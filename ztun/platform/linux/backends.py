"""Choosing how to capture: TCX, clsact filters, or routes alone."""

from __future__ import annotations

from functools import partial

import structlog

from ztun.errors import ConfigError, ZtunError
from ztun.platform.linux import layout, loader, xdp
from ztun.platform.linux.bpfcall import has_tcx
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.classifier import MAPS, PROGRAMS, BpfClassifier
from ztun.platform.linux.hooks import ClsactHook, TcxHook
from ztun.platform.linux.netlink import NetlinkError, explain
from ztun.platform.linux.policy import RoutesClassifier

log = structlog.get_logger("ztun.classifier")

BACKENDS = ("auto", "bpf", "tcx", "clsact", "routes")


async def choose(backend: str, capture: Capture) -> BpfClassifier | RoutesClassifier:
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
    return classifier


async def _load(backend: str, capture: Capture) -> BpfClassifier:
    programs = {xdp.PROGRAM: xdp.label(capture.device)} if capture.xdp else {}
    objects = await loader.load(layout.find_sources(), PROGRAMS, {**MAPS, **xdp.MAPS}, programs)
    if objects.refused:
        log.warning("no XDP, tc drops alone", reason=", ".join(objects.refused.values()))
    try:
        reason = _why_not_tcx(backend, objects, capture)
        if reason is None:
            return BpfClassifier(objects, "tcx", TcxHook, capture)
        make_hook = partial(ClsactHook, device=capture.device)
        _try_clsact(make_hook, objects, capture)
        classifier = BpfClassifier(objects, "clsact", make_hook, capture)
    except BaseException:
        objects.close()
        raise
    classifier.fallback_reason = None if backend == "clsact" else reason
    return classifier


def _why_not_tcx(backend: str, objects: loader.Objects, capture: Capture) -> str | None:
    """None when TCX it is. Raises ZtunError when it was asked for by name and the kernel has none."""
    if backend == "clsact":
        return "asked for"
    if not has_tcx(objects.programs["reply"]):
        if backend == "tcx":
            raise ZtunError("this kernel has no TCX (Linux 6.6): set capture.backend to auto")
        return "this kernel has no TCX (Linux 6.6)"
    if capture.fail_closed and backend != "tcx":
        return "fail is closed, and a TCX link would not outlive a killed process"
    return None


def _try_clsact(make_hook: partial[ClsactHook], objects: loader.Objects, capture: Capture) -> None:
    """Attach to our own TUN and detach: the one way to know whether the kernel can."""
    try:
        make_hook("reply", objects.programs["reply"], capture.device).close()
    except NetlinkError as error:
        raise ZtunError(f"this kernel takes no BPF filter on clsact: {explain(error)}") from error
