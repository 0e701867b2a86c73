"""Linux in the place of macOS: the calls of ztun.platform.darwin, answered by the network namespace we are in.

A utun is a TUN behind a pair of sockets that speaks its framing; ifconfig, route and sysctl become ip(8) and files of
/proc/sys; what rtnetlink says comes out as messages of a routing socket. The messages, errors and words of programs are
written from XNU's headers and manuals (encoding.py), not recorded on a Mac.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Sequence
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

from darwin import encoding
from ztun.platform.darwin import numbers
from ztun.platform.darwin.calls import Done

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI, _IFF_TUN_EXCL = 0x1, 0x1000, 0x8000
_CONTROL = 7  # the number that the kernel control got
_FAMILY = {4: encoding.AF_INET.to_bytes(4, "big"), 6: encoding.AF_INET6.to_bytes(4, "big")}
_SYSCTLS = {
    "net.inet.ip.forwarding": "ipv4/ip_forward",
    "net.inet6.ip6.forwarding": "ipv6/conf/all/forwarding",
}
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_*: links, addresses, routes
_IFF_UP, _IFF_RUNNING = 0x1, 0x40  # the same numbers on both systems


class LinuxStandIn:
    """A ztun.platform.darwin.calls.Calls. ran: the programs that were asked for; frames: what went through utuns."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.frames: list[bytes] = []
        self._far: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {}
        self.bridges: dict[str, Bridge] = {}

    # The kernel control.

    def control_socket(self) -> socket.socket:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._far[near.fileno()] = far
        return near

    def control_id(self, sock: socket.socket, name: str) -> int:
        if name != "com.apple.net.utun_control":
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return _CONTROL

    def connect_control(self, sock: socket.socket, control: int, unit: int) -> None:
        assert control == _CONTROL
        present = {name for _, name in socket.if_nameindex()}
        name = f"utun{unit - 1}" if unit else next(f"utun{n}" for n in range(100) if f"utun{n}" not in present)
        far = self._far.pop(sock.fileno())
        try:
            self.bridges[name] = Bridge(name, far, self.frames)
        except OSError:
            far.close()
            raise
        self._names[sock.fileno()] = name

    def interface_name(self, sock: socket.socket) -> str:
        return self._names[sock.fileno()]

    # Sockets.

    def bind_interface(self, sock: socket.socket, index: int) -> None:
        name = socket.if_indextoname(index) if index else ""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode() + b"\0")

    def route_socket(self) -> socket.socket:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threading.Thread(target=_tell, args=(_netlink(), far), daemon=True).start()
        return near

    def dump(self, what: int, argument: int = 0) -> bytes:
        if what == numbers.NET_RT_FLAGS:
            assert argument == encoding.LLINFO
            return dump_neighbours()
        return dump_interfaces() if what == numbers.NET_RT_IFLIST else dump_routes()

    # Programs.

    def run(self, argv: Sequence[str]) -> Done:
        self.ran.append(list(argv))
        program, *arguments = argv
        return {"ifconfig": _ifconfig, "route": _route, "sysctl": _sysctl}[program](arguments)


class Bridge:
    """Carries packets between a TUN and the far end of a control socket, utun's family in front, until one ends."""

    def __init__(self, name: str, far: socket.socket, frames: list[bytes]) -> None:
        self.name = name
        self._far = far
        self._frames = frames
        self._tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            flags = _IFF_TUN | _IFF_NO_PI | _IFF_TUN_EXCL
            fcntl.ioctl(self._tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        except OSError:
            os.close(self._tun)
            raise
        self._stop_read, self._stop_write = os.pipe()
        threading.Thread(target=self._run, daemon=True).start()

    def remove(self) -> None:
        """The interface goes, as nothing on macOS should do to it: whoever reads is told."""
        os.write(self._stop_write, b"x")

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([self._tun, self._far, self._stop_read], [], [])
                if self._stop_read in ready:
                    break
                if self._tun in ready:
                    packet = os.read(self._tun, 65536)
                    self._note(_FAMILY[packet[0] >> 4] + packet, self._far.send)
                if self._far in ready:
                    frame = self._far.recv(65536)
                    if not frame:
                        break
                    self._note(frame, lambda whole: os.write(self._tun, whole[4:]))
        os.close(self._tun)
        self._far.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def _note(self, frame: bytes, carry: Any) -> None:
        assert frame[:4] == _FAMILY[frame[4] >> 4], frame[:8].hex()
        if len(self._frames) < 20000:
            self._frames.append(frame)
        with contextlib.suppress(OSError):  # the TUN is down, or does not take this packet
            carry(frame)


# What the kernel tells.


def _ip(*arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(["ip", "-j", *arguments], check=True, capture_output=True, text=True)
    found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    return found


def dump_interfaces() -> bytes:
    """NET_RT_IFLIST of this namespace: each interface, followed by its addresses."""
    out = b""
    for link in _ip("address"):
        if not link:
            continue
        enabled = "UP" in link["flags"]
        running = enabled and ("LOWER_UP" in link["flags"])
        flags = (_IFF_UP if enabled else 0) | (_IFF_RUNNING if running else 0)
        out += encoding.if_msghdr(link["ifindex"], flags, link["ifname"])
        for entry in link.get("addr_info", ()):
            out += encoding.ifa_msghdr(encoding.RTM_NEWADDR, link["ifindex"], entry["local"], entry["prefixlen"])
    return out


def dump_routes() -> bytes:
    """NET_RT_DUMP of this namespace: its table main."""
    out = b""
    for family in ("-4", "-6"):
        for entry in _ip(family, "route", "show", "table", "main"):
            if "dev" not in entry:
                continue
            everything = "0.0.0.0/0" if family == "-4" else "::/0"
            network = ip_network(everything if entry["dst"] == "default" else entry["dst"])
            index = socket.if_nametoindex(entry["dev"])
            out += encoding.route(str(network.network_address), network.prefixlen, index, entry.get("gateway"))
    return out


def dump_neighbours() -> bytes:
    """NET_RT_FLAGS with RTF_LLINFO: as arp(8) and ndp(8) read it."""
    out = b""
    for entry in _ip("neighbour"):
        if "lladdr" in entry:
            index, mac = socket.if_nametoindex(entry["dev"]), bytes.fromhex(entry["lladdr"].replace(":", ""))
            named = {
                encoding.DST: encoding.sockaddr(entry["dst"]),
                encoding.GATEWAY: encoding.sockaddr_dl(index, "", mac),
            }
            flags = encoding.UP | encoding.HOST | encoding.LLINFO
            out += encoding.rt_msghdr(encoding.RTM_GET, index, flags, named)
    return out


def _netlink() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    sock.bind((0, _GROUPS))
    return sock


def _tell(netlink: socket.socket, far: socket.socket) -> None:
    """Say on a routing socket what rtnetlink says, until nobody listens."""
    with netlink, far, contextlib.suppress(OSError):
        while True:
            ready, _, _ = select.select([netlink, far], [], [])
            if far in ready:
                return  # its other end is closed
            try:
                data = netlink.recv(65536)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue  # some is lost, as a routing socket that is full loses it; what comes next makes up for it
            kind = struct.unpack_from("=IH", data)[1]
            message = _translated(kind, data[16:])
            if message is not None:
                far.send(message)


def _translated(kind: int, body: bytes) -> bytes | None:
    if kind in (16, 17):  # RTM_NEWLINK, RTM_DELLINK
        _family, _type, index, flags, _change = struct.unpack_from("=BxHiII", body)
        return encoding.if_msghdr(index, 0 if kind == 17 else flags & (_IFF_UP | _IFF_RUNNING), None)
    if kind in (20, 21):  # RTM_NEWADDR, RTM_DELADDR
        index = struct.unpack_from("=4xI", body)[0]
        return encoding.ifa_msghdr(encoding.RTM_NEWADDR if kind == 20 else encoding.RTM_DELADDR, index, "0.0.0.0", 32)
    if kind in (24, 25):  # RTM_NEWROUTE, RTM_DELROUTE
        return encoding.route("0.0.0.0", 0, 0, kind=encoding.RTM_ADD if kind == 24 else encoding.RTM_DELETE)
    return None


# What the programs do.


def _do(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def _ifconfig(arguments: list[str]) -> Done:
    """ifconfig(8): `utun7 mtu 1500 up`, `utun7 inet A/L A alias`, `utun7 inet6 A/L alias`, `… -alias`, `utun7 down`."""
    name, *words = arguments
    if words[0] == "mtu":
        return _said(name, _do("link", "set", name, "mtu", words[1], "up"))
    if words[0] == "down":
        return _said(name, _do("link", "set", name, "down"))
    if words[-1] == "-alias":
        length = "32" if words[0] == "inet" else "48"
        return _said(name, _do("address", "del", f"{words[1]}/{length}", "dev", name))
    address = ip_interface(words[1])
    # A point-to-point link: the network is not routed to it by its address.
    extra = ["nodad"] if address.version == 6 else []
    length = 32 if address.version == 4 else address.network.prefixlen
    return _said(name, _do("address", "replace", f"{address.ip}/{length}", "dev", name, *extra))


def _said(name: str, result: tuple[int, str]) -> Done:
    code, output = result
    if "Cannot find device" in output:
        return Done(1, f"ifconfig: interface {name} does not exist")
    return Done(code, output.strip())


def _route(arguments: list[str]) -> Done:
    """route(8): `-n add|delete -inet|-inet6 -net N/L -interface utun7`."""
    _numeric, verb, family, _net, network, _interface, name = arguments
    command = [{"-inet": "-4", "-inet6": "-6"}[family], "route", {"add": "add", "delete": "del"}[verb]]
    code, output = _do(*command, network, "dev", name)
    if not code:
        return Done(0, f"{verb} net {network}: gateway {name}")
    if "File exists" in output or (verb == "add" and _is_there(network)):
        return Done(0, f"writing to routing socket: File exists\nadd net {network}: gateway {name}: File exists")
    if verb == "delete":
        return Done(0, "writing to routing socket: No such process\ndelete net: not in table")
    return Done(71, f"route: bad address: {name}")


def _is_there(network: str) -> bool:
    return bool(_ip("-6" if ":" in network else "-4", "route", "show", "exact", network))


def _sysctl(arguments: list[str]) -> Done:
    """sysctl(8): `-n NAME`, `-w NAME=VALUE`."""
    name, _, value = arguments[1].partition("=")
    path = Path("/proc/sys/net", _SYSCTLS[name])
    if arguments[0] == "-n":
        return Done(0, path.read_text().strip())
    path.write_text(value)
    return Done(0, f"{name}: {value}")
