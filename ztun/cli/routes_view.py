"""The body of GET /routes for a person: what is installed in the kernel, and how often each part of it was hit.

Every row stays on its line at 80 columns, whatever the names and addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ztun.cli.output import INDENT, heading, print_line, print_paragraph, rows, say, say_bytes, say_count, say_rate

# What the ids in the tables mean (ztun/ports.py).
RULE_NAMES = {-1: "default", -2: "built in", -3: "fake ip", -4: "dns hijack"}

_BACKENDS = {
    "tcx": "BPF on TCX links; they vanish with the process",
    "clsact": "BPF in clsact filters; a heartbeat lets traffic pass when the process is gone",
    "routes": "no BPF: routes alone decide",
}
_ROLES = {"tun": "TUN", "lan": "LAN"}
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
_KEYS = ("prefix", "address", "counter", "rule", "key")  # what names an entry of a map
_NUMBERS = ("rule", "hits", "hits/s", "packets", "packets/s", "size", "size/s", "value")
# These two are shown as "Counters" and "Rules", unless they are asked for by name.
_ELSEWHERE = ("counters", "rules")


def print_routes(console: Console, answer: Mapping[str, Any], *, every: bool = False, name: str | None = None) -> None:
    """Print it all. name: of the one map that was asked for. every: also what is zero or empty."""
    _print_state(console, answer)
    if name is not None:
        for table in answer["maps"]:
            _print_map(console, table)
        return
    without_xdp = {entry["ifname"]: entry["reason"] for entry in answer.get("xdp") or () if entry["reason"]}
    _print_interfaces(console, answer.get("interfaces") or (), without_xdp)
    _print_lines(console, "Routes", answer.get("routes"))
    _print_lines(console, "IP rules", [_say_rule(rule) for rule in answer.get("ip_rules") or ()])
    _print_sysctls(console, answer.get("sysctls") or ())
    _print_list(console, "Left-overs", answer.get("leftovers") or (), "none")
    _print_rules(console, answer)
    _print_maps(console, answer.get("maps") or (), every)
    _print_counters(console, answer.get("counters") or {}, every)
    if answer.get("unseen"):
        _print_list(console, "Not seen", answer["unseen"], "")


def _print_state(console: Console, answer: Mapping[str, Any]) -> None:
    state, backend = str(answer.get("state", "running")), answer.get("backend")
    pid = f", pid {answer['pid']}" if answer.get("pid") else ""
    is_running = state == "running"
    first = Text.assemble((state, "bold" if is_running else "bold yellow"), pid)
    if backend:
        first.append(f", backend {backend}", "bold")
    print_line(console, first)
    if backend in _BACKENDS:
        print_paragraph(console, _BACKENDS[str(backend)], style="dim")
    if answer.get("fallback_reason"):
        print_paragraph(console, f"instead of the first choice: {answer['fallback_reason']}", style="yellow")
    beat = answer.get("heartbeat")
    if beat:
        age = "never beat" if beat["age_ms"] is None else f"{_say_age(beat['age_ms'])} ago"
        verdict = "stale: traffic passes, or ends with fail: closed" if beat["stale"] else "alive"
        print_line(console, f"heartbeat {age}, {verdict}", style="yellow" if beat["stale"] else "")
    firewall = answer.get("firewall")
    if firewall:
        said = f"a firewall drops what is tunnelled ({', '.join(firewall['drops'])}): {firewall['remedy']}"
        print_paragraph(console, said, style="yellow")
    if answer.get("firewall"):
        drops = ", ".join(answer["firewall"]["drops"])
        print_paragraph(
            console, f"a firewall drops what is forwarded: {drops}; {answer['firewall']['remedy']}", style="yellow"
        )
    if answer.get("waiting"):
        print_paragraph(console, f"waiting for {', '.join(answer['waiting'])}", style="yellow")


def _say_age(milliseconds: int) -> str:
    return f"{milliseconds} ms" if milliseconds < 10_000 else f"{milliseconds // 1000} s"


def _print_interfaces(
    console: Console, interfaces: Sequence[Mapping[str, Any]], without_xdp: Mapping[str, str]
) -> None:
    heading(console, "Interfaces", "" if interfaces else "none")
    for entry in interfaces:
        words = [_ROLES.get(entry["role"], "")]
        if entry["link"] == "absent":
            words.append("absent")
        else:
            words += [say(entry["link"]), f"MTU {entry['mtu']}"]
        if entry["state"] not in (None, "absent"):
            words.append(str(entry["state"]))
        print_line(console, f"{INDENT}{entry['ifname']:<15}  {', '.join(filter(None, words))}")
        for one in entry["attached"]:
            style = "" if one["owner"] == "ztun" else "dim"
            print_line(console, f"{INDENT * 2}{_say_program(one)}", style=style)
        if entry["ifname"] in without_xdp:
            print_paragraph(console, f"no XDP: {without_xdp[entry['ifname']]}", indent=INDENT * 2, style="yellow")


def _say_program(one: Mapping[str, Any]) -> str:
    name = one["name"] or one.get("filter") or "?"
    ours = "" if one["owner"] == "ztun" else "  not ours"
    return f"{one['hook']:<14}  {name[:15]:<15}  id {say(one['id']):<7}  tag {say(one['tag'])}{ours}"


def _print_lines(console: Console, title: str, entries: Any) -> None:
    entries = list(entries or ())
    heading(console, title, "" if entries else "none")
    for entry in entries:
        print_paragraph(console, _say_line(entry), indent=INDENT)


def _say_line(entry: Any) -> str:
    """A route as iproute2 would write it: the destination first, then `key value` pairs."""
    if not isinstance(entry, Mapping):
        return say(entry)
    first = next((key for key in ("destination", "dst", "prefix") if key in entry), None)
    words = [say(entry[first])] if first else []
    words += [
        f"{key.replace('_', ' ')} {say(value)}" for key, value in entry.items() if key != first and value is not None
    ]
    return " ".join(words)


def _say_rule(rule: Mapping[str, Any]) -> str:
    """As `ip rule` would write it, with the family in front."""
    number = rule.get("ip_protocol")
    words = {
        "from": rule.get("from"),
        "iif": rule.get("iif"),
        "proto": _PROTOCOLS.get(number, number) if number is not None else None,
        "port": rule.get("port"),
        "lookup": rule.get("table"),
    }
    said = " ".join(f"{key} {value}" for key, value in words.items() if value is not None)
    return f"{rule.get('priority')}: {rule.get('family')} {said}"


def _print_sysctls(console: Console, sysctls: Sequence[Mapping[str, Any]]) -> None:
    heading(console, "Sysctls changed", "" if sysctls else "none")
    if sysctls:
        rows(console, sysctls, keep=("before", "now"))


def _print_list(console: Console, title: str, lines: Sequence[str], none: str) -> None:
    heading(console, title, "" if lines else none)
    for line in lines:
        print_paragraph(console, say(line), indent=INDENT)


def _print_rules(console: Console, answer: Mapping[str, Any]) -> None:
    rules = list(answer.get("rules") or ())
    counted = next((table["entries"] for table in answer.get("maps") or () if table["name"] == "rules"), ())
    built_in = [entry for entry in counted if entry["rule"] < 0 and entry["packets"]]
    shown = [
        {
            "rule": RULE_NAMES.get(rule["rule"], rule["rule"]),
            "conditions": rule.get("conditions", ""),
            "outbound": rule.get("outbound", ""),
            **{key: figure for key, figure in _figures(rule).items() if not key.startswith("size")},
        }
        for rule in [*rules, *built_in]
    ]
    if shown:
        heading(console, "Rules")
        rows(console, shown, numbers=_NUMBERS)


def _print_maps(console: Console, maps: Sequence[Mapping[str, Any]], every: bool) -> None:
    shown = [table for table in maps if every or table["name"] not in _ELSEWHERE]
    empty = [table["name"] for table in shown if not table["entries"] and not every]
    for table in shown:
        if table["name"] not in empty:
            _print_map(console, table)
    if empty:
        heading(console, "Empty maps", ", ".join(empty))


def _print_map(console: Console, table: Mapping[str, Any]) -> None:
    entries = table["entries"]
    count = table.get("count", len(entries))
    heading(console, f"Map {table['name']}", f"{table['type']}, {count:,} {'entry' if count == 1 else 'entries'}")
    if entries:
        rows(console, [_map_row(entry) for entry in entries], numbers=_NUMBERS, keep=_KEYS)
    if count > len(entries):
        print_line(console, f"{INDENT}… {count - len(entries):,} more with fewer hits; --all shows them", style="dim")


def _map_row(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        return {"entry": entry}
    shown = {key: value for key, value in entry.items() if key not in _FIGURES}
    if "rule" in shown:
        shown["rule"] = RULE_NAMES.get(shown["rule"], shown["rule"])
    return {**shown, **_figures(entry)}


def _print_counters(console: Console, counters: Mapping[str, Any], every: bool) -> None:
    seen = {name: figures for name, figures in counters.items() if every or any(figures.values())}
    heading(console, "Counters", "" if seen else "nothing seen yet")
    if seen:
        rows(console, [{"verdict": name, **_figures(figures)} for name, figures in seen.items()], numbers=_NUMBERS)


_FIGURES = ("hits", "packets", "bytes", "hits_per_s", "packets_per_s", "bytes_per_s")


def _figures(entry: Mapping[str, Any]) -> dict[str, str]:
    """The counters of an entry, each with its rate behind it where that is known."""
    said = {}
    for key in ("hits", "packets"):
        if key in entry:
            said[key] = say_count(entry[key])
        if f"{key}_per_s" in entry:
            said[f"{key}/s"] = say_rate(entry[f"{key}_per_s"])
    if "bytes" in entry:
        said["size"] = say_bytes(entry["bytes"])
    if "bytes_per_s" in entry:
        said["size/s"] = say_bytes(entry["bytes_per_s"])
    return said
