"""Choosing how to capture: TCX, clsact filters, or routes alone."""

from __future__ import annotations

from functools import partial

import structlog

from ztun.errors import ConfigError, ZtunError
from ztun.platform.linux import bpf, layout
from ztun.platform.linux.bpfcall import has_tcx
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.classifier import MAPS, PROGRAMS, BpfClassifier
from ztun.platform.linux.hooks import ClsactHook, TcxHook
from ztun.platform.linux.netlink import NetlinkError, explain
from ztun.platform.linux.policy import RoutesClassifier

log = structlog.get_logger("ztun.classifier")

BACKENDS = ("auto", "bpf", "tcx", "clsact", "routes")


def choose(backend: str, capture: Capture) -> BpfClassifier | RoutesClassifier:
    """Make the classifier that `capture.backend` asks for; "auto" takes the best that works here and says why.

    Raises ZtunError when what was asked for cannot be had.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"capture.backend: {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "routes":
        return RoutesClassifier(capture)
    try:
        classifier = _load(backend, capture)
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
        log.warning("no TCX: capturing with clsact filters", reason=classifier.fallback_reason)
    return classifier


def _load(backend: str, capture: Capture) -> BpfClassifier:
    objects = bpf.load(layout.find_sources(), PROGRAMS, tuple(MAPS))
    try:
        tcx = backend != "clsact" and has_tcx(objects.programs["reply"])
        if backend == "tcx" and not tcx:
            raise ZtunError("this kernel has no TCX (Linux 6.6): set capture.backend to auto")
        if tcx:
            return BpfClassifier(objects, "tcx", TcxHook, capture)
        make_hook = partial(ClsactHook, device=capture.device)
        _try_clsact(make_hook, objects, capture)
        classifier = BpfClassifier(objects, "clsact", make_hook, capture)
    except BaseException:
        objects.close()
        raise
    if backend != "clsact":
        classifier.fallback_reason = "this kernel has no TCX (Linux 6.6)"
    return classifier


def _try_clsact(make_hook: partial[ClsactHook], objects: bpf.Objects, capture: Capture) -> None:
    """Attach to our own TUN and detach: the one way to know whether the kernel can."""
    try:
        make_hook("reply", objects.programs["reply"], capture.device).close()
    except NetlinkError as error:
        raise ZtunError(f"this kernel takes no BPF filter on clsact: {explain(error)}") from error
