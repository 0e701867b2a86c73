"""The control socket: HTTP on a unix socket of mode 0600.

GET /status, GET /flows, GET /routes, GET and POST /log-level, POST /stop: JSON. GET /metrics: OpenMetrics.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web

from ztun.control.bodies import cut_maps, encode
from ztun.control.lock import AlreadyRunning, make_directories, peer_pid
from ztun.control.metrics import CONTENT_TYPE, render
from ztun.errors import ZtunError
from ztun.log.components import Levels
from ztun.log.system import log_system

log = structlog.get_logger("ztun.control")

Answer = Callable[[], dict[str, Any]]


class ControlServer:
    """Answers from callables that the composition root gives, so that it knows nothing of what it reports.

    status, flows, routes: make the body of the answer, `routes` in a thread of its own. stop: asks for a graceful end
    and returns at once. levels: those of the log, to look at and to change.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        status: Answer,
        routes: Answer,
        flows: Answer = lambda: {"flows": []},
        stop: Callable[[], None],
        levels: Levels = log_system.levels,
    ) -> None:
        self.path = Path(path)
        self._status = status
        self._routes = routes
        self._flows = flows
        self._stop = stop
        self._levels = levels
        self._runner: web.AppRunner | None = None
        self._inode: tuple[int, int] | None = None
        self._made: list[Path] = []

    async def start(self) -> None:
        """Listen. Raises AlreadyRunning when something answers there, ZtunError when the socket cannot be made."""
        listener = self._bind()
        application = web.Application(middlewares=[_one_line_errors])
        application.add_routes(
            [
                web.get("/status", self._get_status),
                web.get("/flows", self._get_flows),
                web.get("/routes", self._get_routes),
                web.get("/metrics", self._get_metrics),
                web.get("/log-level", self._get_log_level),
                web.post("/log-level", self._post_log_level),
                web.post("/stop", self._post_stop),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()

    async def close(self) -> None:
        """Stop listening and remove the socket. Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        with suppress(OSError):
            if self._inode == _identity(self.path):
                self.path.unlink()
        self._inode = None
        for directory in reversed(self._made):
            with suppress(OSError):
                directory.rmdir()
        self._made = []

    def _bind(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._made = make_directories(self.path.parent)
            _remove_stale(self.path)
            listener.bind(os.fspath(self.path))
            self._inode = _identity(self.path)
            # Nobody can connect before listen(), so there is no moment in which others may.
            self.path.chmod(0o600)
            listener.listen(16)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise ZtunError(
                f"cannot listen on control.socket {self.path}: {error.strerror or error}; set it to a writable place"
            ) from error
        except ZtunError:
            listener.close()
            raise
        return listener

    async def _get_status(self, request: web.Request) -> web.Response:
        return web.json_response(self._status())

    async def _get_flows(self, request: web.Request) -> web.Response:
        return web.json_response(self._flows())

    async def _get_routes(self, request: web.Request) -> web.Response:
        """?most=N: so many entries of each map; ?map=NAME: of this map alone, all of them."""
        most, name = request.query.get("most"), request.query.get("map")
        if most is not None and not most.isdecimal():
            return web.json_response({"error": f"most: {most!r} is no number"}, status=400)

        def answer() -> bytes:
            return encode(cut_maps(self._routes(), int(most) if most is not None else None, name))

        return web.Response(body=await asyncio.to_thread(answer), content_type="application/json")

    async def _get_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=render(self._status()), headers={"Content-Type": CONTENT_TYPE})

    async def _get_log_level(self, request: web.Request) -> web.Response:
        return web.json_response(self._levels.snapshot())

    async def _post_log_level(self, request: web.Request) -> web.Response:
        """Body: {"level": a level or "default", "component": one, or null for the general level}."""
        try:
            wanted = await request.json()
            level, component = wanted["level"], wanted.get("component")
            self._levels.set(level, component)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = str(error) if type(error) is ValueError else 'the body must be {"level": …, "component": …}'
            return web.json_response({"error": said}, status=400)
        log.info("log level changed", component=component, to=level)
        return web.json_response(self._levels.snapshot())

    async def _post_stop(self, request: web.Request) -> web.Response:
        log.info("asked to stop")
        self._stop()
        return web.json_response({"state": "stopping", "pid": os.getpid()}, status=202)


@web.middleware
async def _one_line_errors(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        return web.json_response({"error": f"{request.method} {request.path}: {error.reason}"}, status=error.status)
    except Exception as error:
        log.exception("request failed", path=request.path, error=repr(error))
        return web.json_response({"error": f"{request.path} failed: {error!r}"}, status=500)
    return response


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat(follow_symlinks=False)
    return status.st_dev, status.st_ino


def _remove_stale(path: Path) -> None:
    """Make room for our socket. Raises AlreadyRunning when someone listens, ZtunError when it is no socket."""
    try:
        mode = path.stat(follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ZtunError(f"control.socket {path} exists and is not a socket; move it away or set another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with suppress(FileNotFoundError):
                path.unlink()
            return
        pid = peer_pid(probe)
    raise AlreadyRunning(f"already running as pid {pid} (it answers on {path}); stop it with `ztun down` first")
