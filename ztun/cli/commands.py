"""What can be typed: options, defaults and help. The work is done in the modules that each command imports."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ztun import __version__
from ztun.cli.streams import to_json
from ztun.control import DEFAULT_SOCKET

application = typer.Typer(
    name="ztun",
    help="A transparent-proxy gateway: chosen names and networks go through a proxy, the rest goes direct.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_INTERVAL = 2.0  # seconds between two looks of --watch

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="The configuration file.")]
SocketOption = Annotated[
    Path | None,
    typer.Option("--socket", metavar="PATH", readable=False, help=f"The control socket. Default: {DEFAULT_SOCKET}"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LogLevelOption = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error; debug shows tracebacks."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ztun {__version__}")
        raise typer.Exit


@application.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A transparent-proxy gateway: chosen names and networks go through a proxy, the rest goes direct."""


@application.command()
def up(
    config: ConfigOption = None,
    proxy: Annotated[
        str | None, typer.Option(metavar="URL", help="socks5://[user:pass@]host:port or http://…; becomes the default.")
    ] = None,
    lan: Annotated[
        list[str] | None, typer.Option(metavar="IFACE", help="Capture the clients behind this interface; repeatable.")
    ] = None,
    host: Annotated[bool, typer.Option("--host", help="Capture what this machine itself sends.")] = False,
    socket: SocketOption = None,
    log_level: LogLevelOption = None,
    json: JsonOption = False,
) -> int:
    """Start in the foreground; SIGINT, SIGTERM or `ztun down` undo everything it did."""
    from ztun.cli.up import run_up

    return run_up(config, proxy=proxy, lan=lan or [], host=host, socket=socket, log_level=log_level, json=json)


@application.command()
def down(
    config: ConfigOption = None,
    socket: SocketOption = None,
    log_level: LogLevelOption = None,
    json: JsonOption = False,
) -> int:
    """Stop the running instance and wait until it is gone; without one, remove what a killed one left behind."""
    from ztun.cli.down import run_down

    return run_down(config, socket, json=json)


@application.command()
def status(
    config: ConfigOption = None,
    socket: SocketOption = None,
    log_level: LogLevelOption = None,
    json: JsonOption = False,
    flows: Annotated[bool, typer.Option("--flows", help="List the flows that live, the oldest first.")] = False,
) -> int:
    """Show what the running instance does: flows, datagrams, names, outbounds, drops."""
    client = _client(config, socket)
    answer = client.flows() if flows else client.status()
    if json:
        print(to_json(answer))
    elif flows:
        from ztun.cli.status import show_flows

        show_flows(answer["flows"])
    else:
        from ztun.cli.status import show_status

        show_status(answer)
    return 0


@application.command()
def routes(
    config: ConfigOption = None,
    socket: SocketOption = None,
    log_level: LogLevelOption = None,
    json: JsonOption = False,
    every: Annotated[bool, typer.Option("--all", help="All entries of all maps, and counters that are zero.")] = False,
    name: Annotated[str | None, typer.Option("--map", metavar="NAME", help="All entries of this map alone.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C, with rates per second.")] = False,
    interval: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks of --watch. Default: 2")
    ] = None,
) -> int:
    """Show what is installed: programs, routes, ip rules, maps with their entries and hits, left-overs."""
    if interval is not None and not watch:
        raise typer.BadParameter("goes with --watch", param_hint="--interval")
    from ztun.cli.routes import run_routes

    period = (interval or DEFAULT_INTERVAL) if watch else None
    return run_routes(_client(config, socket), config, json=json, every=every, name=name, interval=period)


@application.command("log-level")
def log_level(
    level: Annotated[
        Literal["debug", "info", "warning", "error", "default"] | None,
        typer.Argument(metavar="[LEVEL]", help="debug, info, warning, error, or default: what is configured."),
    ] = None,
    component: Annotated[
        str | None, typer.Argument(metavar="[COMPONENT]", help="One component; all that have no level of their own.")
    ] = None,
    config: ConfigOption = None,
    socket: SocketOption = None,
    json: JsonOption = False,
) -> int:
    """Show from which level on the running instance logs, or change it until it stops."""
    client = _client(config, socket)
    answer = client.log_levels() if level is None else client.set_log_level(level, component)
    if json:
        print(to_json(answer))
    else:
        from ztun.cli.log_level import show_log_levels

        show_log_levels(answer)
    return 0


@application.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The configuration file.")],
    log_level: LogLevelOption = None,
    json: JsonOption = False,
) -> int:
    """Say what a configuration file would do, or what is wrong with it, changing nothing."""
    from ztun.cli.check import run_check

    return run_check(file, json=json)


@application.command()
def doctor(
    config: ConfigOption = None,
    proxy: Annotated[str | None, typer.Option(metavar="URL", help="As for `ztun up`.")] = None,
    lan: Annotated[list[str] | None, typer.Option(metavar="IFACE", help="As for `ztun up`; repeatable.")] = None,
    host: Annotated[bool, typer.Option("--host", help="As for `ztun up`.")] = False,
    socket: SocketOption = None,
    log_level: LogLevelOption = None,
    json: JsonOption = False,
) -> int:
    """Check this machine for what `ztun up` needs, and say what to do; changes nothing. 1: something is a problem."""
    from ztun.cli.doctor import run_doctor

    return run_doctor(config, proxy=proxy, lan=lan or [], host=host, socket=socket, log_level=log_level, json=json)


@application.command()
def schema() -> int:
    """Print the JSON Schema of the configuration file."""
    from ztun.config.schema import make_schema

    print(dumps(make_schema(), indent=2))
    return 0


@application.command()
def demo() -> int:
    """Show it at work between network namespaces, without touching this host's network."""
    from ztun.cli.demo import run_demo

    return run_demo()


def _client(config: Path | None, socket: Path | None) -> Any:
    from ztun.control.client import ControlClient, find_socket

    return ControlClient(find_socket(config, socket, DEFAULT_SOCKET))
