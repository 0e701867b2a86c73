"""`ztun status` for a person: the sections of `status --json`, each on a line or in a small table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from ztun.cli.output import heading, make_console, say, say_bytes, say_duration, table

_SECTIONS = ("tcp", "udp", "icmp", "dns", "pool", "log")


def show_status(status: Mapping[str, Any]) -> None:
    """Print the body of GET /status."""
    console = make_console()
    console.print(_first_line(status))
    if status.get("fallback_reason"):
        line = f"captures by {status['backend']} instead of the first choice: {status['fallback_reason']}"
        console.print(line, style="yellow", soft_wrap=True)
    if status.get("network"):
        console.print(_network_line(status["network"]), soft_wrap=True)
    if status.get("privileges"):
        console.print(_rights_line(status["privileges"]), soft_wrap=True)
    for name in _SECTIONS:
        section = status.get(name)
        if section:
            console.print(_section_lines(name, section, console.width), soft_wrap=True)
    servers = _server_rows(status.get("dns") or {})
    if servers:
        heading(console, "DNS servers")
        console.print(table(servers, numbers=_number_columns(servers)))
    outbounds = _rows(status.get("outbounds"))
    if outbounds:
        heading(console, "Outbounds")
        console.print(table(outbounds, numbers=_number_columns(outbounds)))
    for line in _refusals(status.get("outbounds")):
        console.print(line, soft_wrap=True, markup=False)
    drops = {reason: count for reason, count in (status.get("drops") or {}).items() if count}
    heading(console, "Drops", "" if drops else "none")
    if drops:
        console.print(table([{"reason": reason, "count": count} for reason, count in drops.items()], numbers=["count"]))


def show_flows(flows: list[dict[str, Any]]) -> None:
    """Print the body of GET /flows."""
    console = make_console(wide=True)
    if not flows:
        console.print("no flows")
        return
    rows = [
        {
            "": flow["protocol"],
            "client": flow["client"],
            "from": _say_origin(flow),
            "destination": flow["destination"],
            "by": flow["outbound"],
            "state": flow["state"],
            "up": say_bytes(flow["up"]),
            "down": say_bytes(flow["down"]),
            "for": say_duration(flow["seconds"]),
        }
        for flow in flows
    ]
    console.print(table(rows, numbers=["up", "down", "for"]))


def _say_origin(flow: Mapping[str, Any]) -> str:
    """The interface, and the MAC address where there is one."""
    return " ".join(flow[key] for key in ("interface", "mac") if flow.get(key))


def _first_line(status: Mapping[str, Any]) -> Text:
    state = str(status.get("state", "unknown"))
    parts: list[Any] = [(state, "bold green" if state == "running" else "bold yellow")]
    if "uptime_s" in status:
        parts.append(f" for {say_duration(status['uptime_s'])}")
    if "pid" in status:
        parts.append(f", pid {status['pid']}")
    return Text.assemble(*parts)


def _rights_line(privileges: Mapping[str, Any]) -> str:
    """`rights user 0, CAP_NET_ADMIN`: what was not given up."""
    held = privileges.get("capabilities")
    said = "no capabilities" if held == [] else ", ".join(held) if held is not None else "all of its user"
    return f"rights user {privileges['user']}, {said}"


def _network_line(network: Mapping[str, Any]) -> Text:
    """`network up, out by wan0 192.0.2.2, LAN lan0 up`: every way and every interface once."""
    is_up = network.get("state") == "up"
    ways = dict.fromkeys(f"{way['interface']} {way['address']}" for way in network.get("egress", ()))
    lan = [f"{each['name']} {each['state']}" for each in network.get("lan", ())]
    host = [f"{each['name']} {each['state']}" for each in network.get("host", ()) if each["versions"]]
    parts: list[Any] = ["network ", (str(network.get("state")), "green" if is_up else "bold red")]
    parts.append(f", out by {', '.join(ways)}" if ways else ", no way out")
    if lan:
        parts.append(f", LAN {', '.join(lan)}")
    if host:
        parts.append(f", this host {', '.join(host)}")
    return Text.assemble(*parts)


def _section_lines(name: str, section: Any, width: int) -> str:
    """`name` and its figures, filled into lines of `width` columns; a figure stays with its name."""
    if not isinstance(section, Mapping):
        return f"{name:<6}{say(section)}"
    said = ((key, value) for key, value in section.items() if value not in (None, {}, []) and key != "servers")
    words = [f"{key.replace('_', ' ')} {say(value)}" for key, value in said]
    # What may not be broken is held together by a character that wrap() does not take for a space.
    text = ", ".join(word.replace(" ", "\0") for word in words)
    lines = textwrap.wrap(text, width, initial_indent=f"{name:<6}", subsequent_indent=" " * 6, break_long_words=False)
    return "\n".join(lines).replace("\0", " ")


def _rows(outbounds: Any) -> list[dict[str, Any]]:
    """Outbounds as rows, from a list of them or from tag -> figures."""
    if isinstance(outbounds, Mapping):
        return [
            {"tag": tag, **(_say_udp(figures) if isinstance(figures, Mapping) else {"count": figures})}
            for tag, figures in outbounds.items()
        ]
    return [dict(row) for row in outbounds or ()]


def _say_udp(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an outbound with those of its datagrams in a word."""
    udp = figures.get("udp")
    if not isinstance(udp, Mapping):
        return dict(figures)
    return {**figures, "udp": "refused" if udp["verdict"] == "proxy" and udp["reason"] else udp["verdict"]}


def _refusals(outbounds: Any) -> list[str]:
    """A line for each proxy that does not do what it is asked with datagrams."""
    found = outbounds.values() if isinstance(outbounds, Mapping) else ()
    udp = [figures["udp"] for figures in found if isinstance(figures, Mapping) and figures.get("udp")]
    return [f"no datagrams: {each['reason']}" for each in udp if each["verdict"] == "proxy" and each["reason"]]


def _server_rows(dns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """DNS servers as rows, their latency in milliseconds."""
    return [
        {
            "server": server,
            **{key: value for key, value in figures.items() if key != "latency"},
            "mean ms": _milliseconds(figures["latency"]["mean_s"]),
            "max ms": _milliseconds(figures["latency"]["max_s"]),
        }
        for server, figures in dns.get("servers", {}).items()
    ]


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _number_columns(rows: list[dict[str, Any]]) -> list[str]:
    return [key for key in rows[0] if all(isinstance(row.get(key, 0), (int, float)) for row in rows)]
