"""Who logs, and from which level on: a component is what can be made louder or quieter on its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

PREFIX = "ztun."
LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error")}
COMPONENTS = {
    "app": "starting, stopping and undoing",
    "classifier": "the BPF programs and their maps, or what is in their place",
    "control": "the control socket",
    "dns": "queries of clients, and the servers that are asked",
    "engine": "the loop between the TUN device and the stack",
    "flow": "a line for each TCP flow and UDP session that ended or was refused",
    "libraries": "what libraries say through Python's own logging",
    "names": "Fake-IPs and their store",
    "network": "links, addresses and default routes that come and go",
    "outbound": "connections to proxies",
    "pool": "proxy connections that are kept ready",
    "routes": "addresses, routes and ip rules",
    "stack": "packets that the stack drops, by reason",
    "udp": "datagrams that could not be delivered",
}


def component_name(logger: str) -> str:
    """The component that a logger belongs to: that of "ztun.dns" is "dns"; whoever is not ours is a library."""
    name = logger.removeprefix(PREFIX).partition(".")[0]
    return name if name in COMPONENTS and logger.startswith(PREFIX) else "libraries"


def say_unknown(component: str) -> str:
    """What is wrong with a component that there is not."""
    close = get_close_matches(component, COMPONENTS, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"there is no component {component!r}; {guess}known: {', '.join(COMPONENTS)}"


class Threshold:
    """The lowest level that a component logs, as a number (see `LEVELS`); the one thing looked at before a line."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class Levels:
    """The level in general and those of components that have their own, as configured and as changed since."""

    def __init__(self) -> None:
        self._configured: tuple[str, dict[str, str]] = ("info", {})
        self._general = "info"
        self._own: dict[str, str] = {}
        self._thresholds = {name: Threshold(LEVELS["info"]) for name in COMPONENTS}
        self.changed: Callable[[], None] = lambda: None  # told after every change

    def configure(self, general: str, own: Mapping[str, str]) -> None:
        """Set the level in general, and that of some components. Raises ValueError."""
        for name, level in own.items():
            self._check(level, name)
        self._check(general, None)
        self._configured = (general, dict(own))
        self._general, self._own = general, dict(own)
        self._apply()

    def threshold(self, component: str) -> Threshold:
        """That of a component, kept up to date."""
        return self._thresholds[component]

    def set(self, level: str, component: str | None = None) -> None:
        """Change a level at run time: that of one component, or the general one, which those with their own ignore.

        level: a key of LEVELS, or "default" for what is configured. Raises ValueError in one line.
        """
        self._check(level, component)
        general, own = self._configured
        if component is None:
            self._general = general if level == "default" else level
            if level == "default":
                self._own = dict(own)
        elif level != "default":
            self._own[component] = level
        elif component in own:
            self._own[component] = own[component]
        else:
            self._own.pop(component, None)
        self._apply()

    def snapshot(self) -> dict[str, Any]:
        """{"level": the general one, "components": component -> level, "own": components that have their own}."""
        return {
            "level": self._general,
            "components": {name: self._own.get(name, self._general) for name in COMPONENTS},
            "own": sorted(self._own),
        }

    def _check(self, level: str, component: str | None) -> None:
        if level not in LEVELS and level != "default":
            raise ValueError(f"{level!r} is no level; use {', '.join(LEVELS)} or default")
        if component is not None and component not in COMPONENTS:
            raise ValueError(say_unknown(component))

    def _apply(self) -> None:
        for name, threshold in self._thresholds.items():
            threshold.value = LEVELS[self._own.get(name, self._general)]
        self.changed()
