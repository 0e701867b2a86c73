"""The proxies: whether they are there, and greet as proxies do."""

from __future__ import annotations

import asyncio
import os
import socket
from base64 import b64encode

from ztun.config import OutboundSettings
from ztun.doctor.finding import Finding, ok, problem
from ztun.doctor.network import resolve
from ztun.doctor.scene import MARK, Scene
from ztun.platform import facts

# A name that cannot exist (RFC 6761, section 6.4): whatever the proxy answers, it is one.
_NOWHERE = "ztun-doctor.invalid:443"
_NONE, _PASSWORD = 0, 2  # methods of RFC 1928, section 3


async def check_proxies(scene: Scene) -> Finding:
    outbounds = scene.settings.outbounds
    answers = await asyncio.gather(*(_try(outbound, scene.timeout) for outbound in outbounds))
    faults = [f"{outbound.tag}: {why}" for outbound, why in zip(outbounds, answers, strict=True) if why is not None]
    if faults:
        return problem("proxies", "; ".join(faults), "correct outbounds[].server, username and password, or the proxy")
    return ok("proxies", f"{', '.join(each.tag for each in outbounds)} greet as they should" if outbounds else "none")


async def _try(outbound: OutboundSettings, timeout: float) -> str | None:
    """Why a proxy cannot be used, None when it greets us."""
    addresses = await resolve(outbound.host, outbound.port)
    if not addresses:
        return f"{outbound.host} has no address"
    why = None
    for address in addresses:
        try:
            async with asyncio.timeout(timeout):
                why = await _greet(outbound, address)
        except TimeoutError:
            why = f"{outbound.server} is silent for {timeout:g} s"
        except (OSError, EOFError) as error:
            code = getattr(error, "errno", None)
            why = f"{outbound.server}: {os.strerror(code).lower() if code else 'closes the connection'}"
        if why is None:
            return None
    return why


async def _greet(outbound: OutboundSettings, address: str) -> str | None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = facts.sockets(MARK)(family, socket.SOCK_STREAM)
    try:
        await asyncio.get_running_loop().sock_connect(made, (address, outbound.port))
        reader, writer = await asyncio.open_connection(sock=made)
    except BaseException:
        made.close()
        raise
    try:
        return await (_greet_socks if outbound.type == "socks5" else _greet_http)(outbound, reader, writer)
    finally:
        writer.transport.abort()


async def _greet_socks(
    outbound: OutboundSettings, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> str | None:
    """RFC 1928, section 3, and RFC 1929."""
    user, password = _credentials(outbound)
    methods = [_NONE, _PASSWORD] if user else [_NONE]
    writer.write(bytes([5, len(methods), *methods]))
    version, method = await reader.readexactly(2)
    if version != 5:
        return f"{outbound.server} is no SOCKS5 server"
    if method == _PASSWORD and user:
        writer.write(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
        _version, status = await reader.readexactly(2)
        return f"{outbound.server} refuses username and password" if status else None
    if method not in methods:
        return f"{outbound.server} wants {'another way to log in' if user else 'a username and password'}"
    return None


async def _greet_http(
    outbound: OutboundSettings, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> str | None:
    """RFC 9110, section 9.3.6. What becomes of the request says nothing; 407 and silence do."""
    lines = [f"CONNECT {_NOWHERE} HTTP/1.1", f"Host: {_NOWHERE}"]
    user, password = _credentials(outbound)
    if user:
        lines.append(f"Proxy-Authorization: Basic {b64encode(user + b':' + password).decode()}")
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    words = (await reader.readline()).split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return f"{outbound.server} is no HTTP proxy"
    if int(words[1]) == 407:
        return f"{outbound.server} {'refuses' if user else 'wants a'} username and password"
    if int(words[1]) == 405 or int(words[1]) == 501:
        return f"{outbound.server} is a web server, or a proxy without CONNECT"
    return None


def _credentials(outbound: OutboundSettings) -> tuple[bytes, bytes]:
    secret = outbound.password.get_secret_value() if outbound.password is not None else ""
    return (outbound.username or "").encode(), secret.encode()
