"""Real programs to talk to, each with a hosts file of its own: the names in it are known to nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from ztun.lab import servers, sing_box
from ztun.ports import Failure

LONG_NAME = ".".join(("a" * 63, "b" * 63, "c" * 63, "d" * 61))  # 253 characters, the longest name there is
HOSTS = f"""\
127.0.0.1 localhost four.example
::1 six.example
127.0.0.1 {LONG_NAME}
"""
Server = Callable[[Path], AbstractContextManager[int]]
USER, PASSWORD = "walter", "correct-horse"
# The password above; crypt(3) with SHA-512
SHADOW = (
    f"{USER}:$6$ztun$Al2vWkk7GAKVxN5mSbuLTiJyGDjDAK4Pfm4FU"
    "UdMTDuCzbW4Gy8NRDF9bfooOg/tubuwJ0WVqYEqzc.ly0IOQ1:19000::::::\n"
)
# What a ruleset says no with: Dante with reply 2 of RFC 1928, section 6, sing-box with 1, "general failure".
FORBIDDEN = Failure.PROHIBITED if servers.SOCKS_UDP == "danted" else Failure.PROXY_FAILED

# What `socks_without_udp` says to UDP ASSOCIATE.
NO_UDP = Failure.PROHIBITED if servers.SOCKS_UDP == "danted" else Failure.UNSUPPORTED


def free_port() -> int:
    """A TCP port of the loopback addresses that nobody listens on."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.bind(("::", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def program(directory: Path, port: int, *command: str, host: str = "127.0.0.1") -> Iterator[None]:
    """Run `command`, which listens on `port`, with HOSTS as its hosts file and USER as an account of its own."""
    (directory / "hosts").write_text(HOSTS)
    (directory / "passwd").write_text(Path("/etc/passwd").read_text() + f"{USER}:x:65533:65533::/:/usr/sbin/nologin\n")
    (directory / "shadow").write_text(SHADOW)
    binds = "".join(f"mount --bind {directory / name} /etc/{name} && " for name in ("hosts", "passwd", "shadow"))
    log = (directory / "log").open("wb")
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"{binds} exec {shlex.join(command)}"],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        _wait_for(process, host, port)
        yield
    finally:
        process.terminate()
        process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children of Dante outlive it while they have sessions
        log.close()


def _wait_for(process: subprocess.Popen[bytes], host: str, port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.02)
    raise AssertionError(f"{process.args!r} does not listen on port {port}")


@contextlib.contextmanager
def microsocks(directory: Path, *, auth: bool = False, host: str = "127.0.0.1") -> Iterator[int]:
    """A SOCKS5 server; gives its port."""
    port = free_port()
    options = ("-u", USER, "-P", PASSWORD) if auth else ()
    with program(directory, port, "microsocks", "-i", host, "-p", str(port), *options, host=host):
        yield port


@contextlib.contextmanager
def socks_udp(directory: Path, *, auth: bool = False) -> Iterator[int]:
    """A SOCKS5 server that can do UDP, Dante or else sing-box; it forbids 127.0.0.66. Gives its port."""
    port = free_port()
    make = _dante if servers.SOCKS_UDP == "danted" else _sing_box
    with program(directory, port, *make(directory, port, auth)):
        yield port


@contextlib.contextmanager
def sing_box_udp(directory: Path, *, auth: bool = False) -> Iterator[int]:
    """sing-box, whatever else there is. Gives its port."""
    port = free_port()
    with program(directory, port, *_sing_box(directory, port, auth)):
        yield port


@contextlib.contextmanager
def socks_without_udp(directory: Path) -> Iterator[int]:
    """Dante when it may carry connections only, or else microsocks, which knows nothing else. Gives its port."""
    if servers.SOCKS_UDP != "danted":
        with microsocks(directory) as port:
            yield port
        return
    port = free_port()
    command = _dante(directory, port, auth=False)
    conf = directory / "danted.conf"
    conf.write_text(conf.read_text().replace(" udpassociate udpreply", ""))
    with program(directory, port, *command):
        yield port


def _sing_box(directory: Path, port: int, auth: bool) -> list[str]:
    return sing_box.command(directory, "127.0.0.1", port, {USER: PASSWORD} if auth else None, ["127.0.0.66/32"])


def _dante(directory: Path, port: int, auth: bool) -> list[str]:
    (directory / "danted.conf").write_text(f"""\
logoutput: {directory}/danted.log
internal: 127.0.0.1 port = {port}
external: lo
external.rotation: same-same
socksmethod: {"username" if auth else "none"}
clientmethod: none
udp.connectdst: no
user.privileged: root
user.unprivileged: nobody
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks block {{ from: 0.0.0.0/0 to: 127.0.0.66/32 }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 command: connect udpassociate udpreply }}
""")
    return ["danted", "-f", str(directory / "danted.conf"), "-p", str(directory / "danted.pid")]


@contextlib.contextmanager
def tinyproxy(directory: Path, *, auth: bool = False, host: str = "127.0.0.1") -> Iterator[int]:
    """An HTTP proxy that blocks the name blocked.example and CONNECT to port 7. Gives its port."""
    port = free_port()
    (directory / "filter").write_text("blocked.example\n")
    (directory / "tinyproxy.conf").write_text(f"""\
Port {port}
Listen {host}
User nobody
MaxClients 100
Filter "{directory}/filter"
FilterType fnmatch
LogFile "{directory}/tinyproxy.log"
{f"BasicAuth {USER} {PASSWORD}" if auth else ""}
""")
    directory.chmod(0o755)
    with program(directory, port, "tinyproxy", "-d", "-c", str(directory / "tinyproxy.conf"), host=host):
        yield port


@contextlib.asynccontextmanager
async def banner_server(host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A server that speaks first, then echoes, and ends when the client does. Gives its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"220 ready\r\n")
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def converse(sock: socket.socket) -> None:
    """Hear the banner of `banner_server`, be echoed, and hang up."""
    loop = asyncio.get_running_loop()
    with sock:
        assert await read_exactly(sock, 11) == b"220 ready\r\n"
        await loop.sock_sendall(sock, b"hello")
        assert await read_exactly(sock, 5) == b"hello"


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes, fewer when the stream ends before."""
    data = b""
    while len(data) < size:
        piece = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, size - len(data)), 5)
        if not piece:
            break
        data += piece
    return data
