"""`ztun routes`: asks the running instance, or where there is none the kernel; once, or again and again."""

from __future__ import annotations

import json as jsons
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ztun.cli.output import make_console
from ztun.cli.streams import to_json
from ztun.control.bodies import cut_maps
from ztun.control.client import ControlClient, NotAllowed, NotRunning
from ztun.defaults import DEFAULTS
from ztun.errors import ConfigError, ZtunError

# Entries of each map that are shown to a person who did not ask for all.
MOST = 20
DEFAULT_DEVICE = DEFAULTS.device


class Wanted(NamedTuple):
    """What to show. most: entries of each map, None for all; name: of one map alone."""

    most: int | None = None
    name: str | None = None


def run_routes(
    client: ControlClient,
    config: Path | None,
    *,
    json: bool,
    every: bool,
    name: str | None,
    interval: float | None,
) -> int:
    """Print what is installed; with `interval` again and again until Ctrl-C. Returns the exit code.

    Without an instance that answers, what can be seen in the kernel is printed, and the exit code is 1. Raises
    ConfigError for a map that is not there, ZtunError for an instance that cannot answer yet.
    """
    wanted = Wanted(None if json or every else MOST, name)
    if interval is not None:
        from rich.console import Console

        from ztun.cli.routes_view import print_routes
        from ztun.cli.watch import watch

        def show(console: Console, answer: Mapping[str, Any]) -> None:
            print_routes(console, answer, every=every, name=name)

        return watch(lambda: _ask_patiently(client, config, wanted), interval, show=None if json else show)
    answer, problem = _ask(client, config, wanted)
    if problem is None:
        _require_map(answer, name)
    if json:
        print(to_json(answer))
    else:
        show_routes(answer, every=every, name=name)
    if problem is None:
        return 0
    from ztun.cli import fail
    from ztun.cli.streams import flush_stdout

    flush_stdout()
    return fail(str(problem), 1)


def _ask(client: ControlClient, config: Path | None, wanted: Wanted) -> tuple[dict[str, Any], ZtunError | None]:
    """The body to show, and what to say about it."""
    try:
        return client.routes(most=wanted.most, name=wanted.name), None
    except NotRunning as problem:
        return _look("not running", config, wanted), problem
    except NotAllowed as problem:
        return _look("unknown", config, wanted), problem


def _ask_patiently(client: ControlClient, config: Path | None, wanted: Wanted) -> dict[str, Any]:
    """What can be seen, also while an instance starts or stops."""
    try:
        return _ask(client, config, wanted)[0]
    except ConfigError:
        raise
    except ZtunError as problem:
        seen = _look("unknown", config, wanted)
        return {**seen, "unseen": [*seen["unseen"], f"the instance: {problem}"]}


def _look(state: str, config: Path | None, wanted: Wanted) -> dict[str, Any]:
    from ztun import __version__, platform
    from ztun.installed import describe_heartbeat

    device, lan = _read_names(config)
    about: dict[str, Any] = {"state": state, "pid": None, "version": __version__}
    try:
        seen = platform.look(device, lan)
    except OSError as error:
        return {**about, "maps": [], "unseen": [f"the kernel's network state: {error.strerror or error}"]}
    if seen["heartbeat"] is not None:
        seen["heartbeat"] = describe_heartbeat(seen["heartbeat"]["age_ms"])
    return {**about, **cut_maps(seen, wanted.most, wanted.name)}


def _read_names(config: Path | None) -> tuple[str, list[str]]:
    """tun.name and capture.lan, from no more of the file than that needs: it may be half edited."""
    content: Any = {}
    if config is not None:
        with suppress(OSError, ValueError):
            content = jsons.loads(config.read_bytes())
    device = os.environ.get("ZTUN_TUN__NAME") or _dig(content, "tun", "name")
    lan = _dig(content, "capture", "lan")
    names = [name for name in lan if isinstance(name, str)] if isinstance(lan, list) else []
    return device if isinstance(device, str) else DEFAULT_DEVICE, names


def _dig(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _require_map(answer: Mapping[str, Any], name: str | None) -> None:
    if name is not None and not answer["maps"]:
        raise ConfigError(f"--map: there is no map {name!r}; `ztun routes` lists them")


def show_routes(answer: Mapping[str, Any], *, every: bool = False, name: str | None = None) -> None:
    """Print the body of GET /routes for a person."""
    from ztun.cli.routes_view import print_routes

    print_routes(make_console(), answer, every=every, name=name)
