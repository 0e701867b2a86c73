"""The seams between the floors, as Protocols, and the few values that cross them.

Everything above talks to devices, classifiers, routes and proxies through these; tests put fakes behind them.
Addresses cross the seams as packed bytes in network order: 4 bytes for IPv4, 16 for IPv6.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from socket import socket

    from ztun.wire.handshake import Offer, Terms

Buffer = bytes | bytearray | memoryview


class Verdict(IntEnum):
    """What the classifier does with a packet. The numbers are shared with bpf/shared.h."""

    DIRECT = 0
    TUNNEL = 1
    DROP = 2


class Prefix(NamedTuple):
    """One entry of the compiled prefix table.

    network: packed address with the host bits zero; length: prefix length in bits; rule: the index of the rule that
    decided, counted from 0 in file order, or one of the negative ids below.
    """

    network: bytes
    length: int
    verdict: Verdict
    rule: int


# Rule ids of verdicts that no rule of the file gave.
RULE_DEFAULT = -1  # route.default
RULE_BUILTIN = -2  # loopback, link-local, multicast, broadcast, own addresses, own networks
RULE_FAKE_IP = -3  # the Fake-IP ranges
RULE_DNS = -4  # dns.hijack


class Origin(NamedTuple):
    """Where a client's packets come in. mac: 6 bytes, None on interfaces without a link layer (WireGuard, PPP)."""

    interface: str
    mac: bytes | None


class PacketDevice(Protocol):
    """A layer-3 device that speaks IP packets with a 10-byte virtio_net_hdr in front (linux/virtio_net.h).

    A device without offloads (macOS utun) does checksums and segmentation itself, so the stack has one path only.
    """

    name: str
    mtu: int

    def fileno(self) -> int: ...

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        """Read one packet, virtio_net_hdr first. Returns its length in bytes, 0 when there is none to read."""
        ...

    def send(self, buffers: Sequence[Buffer]) -> bool:
        """Write one packet given in pieces, virtio_net_hdr first. False when the kernel refused it (counted)."""
        ...

    def reopen(self) -> None:
        """Make a device of the same name and put it in the place of this one, which somebody removed.

        The descriptor keeps its number, and has to be watched anew. Raises ZtunError.
        """
        ...

    def close(self) -> None: ...


class Classifier(Protocol):
    """Decides in the kernel (or, without BPF, by routes) which packets reach the TUN."""

    backend: str  # "tcx" | "clsact" | "routes" | "python"
    fallback_reason: str | None  # why it is not the first choice of "auto"; None when it is

    def replace_rules(self, prefixes: Iterable[Prefix]) -> None:
        """Make the prefix tables equal to `prefixes`, changing only what differs."""
        ...

    def replacing_rules(self, prefixes: Iterable[Prefix]) -> Iterator[None]:
        """The same in steps that take some milliseconds each; it is done when they are. Raises ZtunError."""
        ...

    def learn(self, address: bytes, verdict: Verdict, rule: int) -> None:
        """Give one address its own verdict, ahead of the prefixes: the real address of a name that a rule decided."""
        ...

    def replace_own_addresses(self, addresses: Iterable[bytes]) -> None:
        """Tell which packed addresses are this host's: never captured, not even their port 53."""
        ...

    def attach(self) -> None:
        """Start to capture on those of the LAN interfaces that are there; the last step of starting up.

        Called again when the interfaces changed: captures on new ones, lets go of those that went or were renamed.
        Raises ZtunError the first time only, with nothing attached; later, `captured` tells what failed.
        """
        ...

    def captured(self) -> Mapping[str, str]:
        """LAN interface -> "captured", "absent", or why its packets cannot be had."""
        ...

    def replace_exits(self, exits: Mapping[str, Collection[int]]) -> None:
        """Tell by which interfaces this host sends to the internet, each with its IP versions; with capture.host they
        are captured from, too.
        """
        ...

    def exits(self) -> Mapping[str, str]:
        """Interface -> whether this host's own packets are captured there, as in `captured`."""
        ...

    def reinstall(self) -> None:
        """The TUN was down or is another one: put back what the kernel removed with it. Raises ZtunError."""
        ...

    def heartbeat(self) -> None:
        """Say that the gateway is alive. Called at least four times a second."""
        ...

    def origin(self, address: bytes) -> Origin | None:
        """Where packets of this client (packed) came in last; None when that is not known, as for this host's own."""
        ...

    def counters(self) -> dict[str, dict[str, int]]:
        """Verdict or drop reason -> {"packets": n, "bytes": n}."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """Programs and maps in human form: {"programs": [...], "maps": [...]} as `ztun routes --json` prints them."""
        ...

    def close(self) -> None:
        """Detach and remove everything. Idempotent."""
        ...


class Routes(Protocol):
    """Addresses, routes, ip rules and sysctls that ztun needs. `up` and `down` are idempotent."""

    def up(self) -> None: ...

    def restore(self) -> None:
        """Put back what somebody took from the TUN: its link up, addresses, routes. Raises ZtunError."""
        ...

    def down(self) -> None: ...

    def snapshot(self) -> dict[str, Any]:
        """{"routes": [...], "ip_rules": [...]} that ztun installed, as `ztun routes --json` prints them."""
        ...


class SystemResolver(Protocol):
    """Brings this host's own queries for some names to ztun, where the classifier does not. Idempotent."""

    def up(self) -> None:
        """Raises ZtunError; nothing is left then."""
        ...

    def down(self) -> None: ...


class NetworkEvent(NamedTuple):
    """Something changed outside: kind is "link", "address", "route" or "rule"; up is False when it went away."""

    kind: str
    ifname: str
    up: bool


class Link(NamedTuple):
    """An interface. enabled: somebody set it up; up: it is, and has a carrier as far as it can tell (RFC 2863); bridge:
    whose port it is, "" where it is none.
    """

    name: str
    ifindex: int
    enabled: bool
    up: bool
    bridge: str = ""


class Path(NamedTuple):
    """How ztun's own packets leave for some destination. up: of the interface; addresses are text, without a scope."""

    ifname: str
    source: str
    gateway: str | None
    up: bool


class NetworkState(NamedTuple):
    """What a host's network looks like.

    links: by name; addresses: (interface name, packed address, prefix length in bits); paths: the way to each address
    that is watched, None where there is none; exits: interface -> the IP versions by which this host reaches the
    internet there; rules: how many rules of the host's policy routing are ours.
    """

    links: Mapping[str, Link]
    addresses: Sequence[tuple[str, bytes, int]]
    paths: Mapping[str, Path | None]
    exits: Mapping[str, Sequence[int]] = MappingProxyType({})
    rules: int = 0


class NetworkMonitor(Protocol):
    """Tells when the network around us changed, and what it is like then. Nothing is polled for."""

    @property
    def state(self) -> NetworkState:
        """As it was when it was read last: by `read`, and before each burst of events."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What the kernel told: "link", "address", "route" messages; "overflows" of what it could not tell."""
        ...

    def watch(self, destinations: Callable[[], Iterable[str]]) -> None:
        """From the next reading on, `state.paths` has the ways to the address literals that are asked for then."""
        ...

    async def read(self) -> NetworkState:
        """Read everything anew. Raises OSError when the kernel does not answer."""
        ...

    def events(self, at_once: Callable[[], None]) -> AsyncIterator[Sequence[NetworkEvent]]:
        """What changed, a settled burst at a time. A link that went and came back within one is told both ways.

        at_once: called whenever links changed, before the burst has settled and anything was read.
        """
        ...

    async def reset_stranded(self, before: NetworkState, former: Collection[str]) -> int:
        """Reset those of ztun's TCP connections that cannot go on: see docs/network-changes.md. Returns how many.

        before: what the network was like; former: the interfaces by which packets left until now.
        """
        ...

    def close(self) -> None: ...


class Destination(NamedTuple):
    """Where a flow wants to go. host: a name, or an address literal without brackets."""

    host: str
    port: int


class Failure(Enum):
    """Why an outbound could not serve a flow, in the words a client can be told."""

    REFUSED = "refused"  # the destination refused: RST, or ICMP port unreachable
    HOST_UNREACHABLE = "host unreachable"
    NETWORK_UNREACHABLE = "network unreachable"
    TIMED_OUT = "timed out"
    NAME_NOT_FOUND = "name not found"
    PROXY_UNREACHABLE = "proxy unreachable"  # the proxy itself could not be reached
    PROXY_AUTHENTICATION = "proxy authentication failed"
    PROXY_FAILED = "proxy failed"  # it answered with something that is no answer, or a general failure
    PROHIBITED = "prohibited"  # the ruleset (ours or the proxy's) forbids it
    UNSUPPORTED = "unsupported"  # e.g. datagrams through an HTTP proxy
    EXHAUSTED = "no descriptors"  # this process may open no more sockets


class OutboundError(Exception):
    """An outbound could not connect. `failure` says why, the message says where in one line."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


DatagramHandler = Callable[[str, int, memoryview, int], None]
"""on_datagram(host, port, payload, size): what one sender sent, datagrams of `size` bytes one behind the other, the
last of which may be shorter. payload must be copied to be kept."""
UnreachableHandler = Callable[[Destination, OutboundError], None]


class DatagramLink(Protocol):
    """A way for datagrams: one local endpoint that any number of destinations can answer (full cone)."""

    def send(self, destination: Destination, payload: Buffer) -> None:
        """Send one datagram now or lose it, as UDP does. Raises OutboundError when the destination refused earlier."""
        ...

    def send_run(self, destination: Destination, payloads: Sequence[Buffer]) -> None:
        """The same for at least one datagram; all have one size, except that the last may be shorter."""
        ...

    def close(self) -> None: ...


Carry = Callable[["socket", str, int, int], bool]
"""(sock, address, port, unread) -> whether a connection that is ready goes on without us, as Offload.take has it. It is
asked before Connected is told, and takes the place of that. address: a literal, "" where it is to be asked for."""


class Dialling(Protocol):
    """A connection that is being made. carry: see Carry; who wants it sets it."""

    carry: Carry | None

    @property
    def over(self) -> bool: ...

    def cancel(self) -> None:
        """Close what was opened; no callback comes any more. Without effect when it is over."""
        ...


Connected = Callable[["socket", bool], None]
"""(sock, more): a connected, non-blocking TCP socket whose next byte is the destination's first. It is the callee's
now, and still watched by the poller for news (Poller.watch), to be handed over. more: there may be bytes already."""

Failed = Callable[[OutboundError], None]


class Outbound(Protocol):
    """A way out: direct, block, a SOCKS5 or an HTTP proxy."""

    tag: str
    type: str

    def dial(self, destination: Destination, connected: Connected, failed: Failed) -> Dialling:
        """Begin to connect; one of the two is called once, perhaps before this returns.

        The deadline is the outbound's own (timeouts.dial).
        """
        ...

    async def open_datagrams(
        self,
        on_datagram: DatagramHandler,
        on_failure: Callable[[OutboundError], None],
        on_unreachable: UnreachableHandler | None = None,
    ) -> DatagramLink:
        """Open a link; `on_datagram` (see DatagramHandler) is called for what comes back, `on_failure` when it dies.

        `on_unreachable(destination, error)` is called when one destination could not be reached (ICMP said so) while
        the link lives on; without it the next `send` to that destination raises.
        Raises OutboundError, with Failure.UNSUPPORTED where the proxy cannot carry datagrams.
        """
        ...

    def refuse_datagrams(self) -> OutboundError | None:
        """Why `open_datagrams` would fail now, where that is known without asking anybody; None where it is not.

        Each refusal is counted.
        """
        ...

    def warm_up(self) -> None:
        """Flows are about to come: make what can wait for them."""
        ...

    def forget_connections(self) -> None:
        """The network changed: what waits may lead nowhere."""
        ...

    def server_addresses(self) -> Sequence[str] | None:
        """Where its proxy is, literals; empty while that is not known; None where there is no proxy."""
        ...

    async def close(self) -> None: ...


ReadyHandler = Callable[[int], None]
"""Told of readiness with a mask: READABLE, WRITABLE and what else poll(2) knows; 0 when it asked for `again`."""

READABLE: Final = 0x001
WRITABLE: Final = 0x004
# POLLRDHUP, POLLHUP, POLLERR: the end of what can be read is near; POLLPRI: an urgent mark, at which a read stops.
# With one of them a short read is not the last.
ENDED: Final = 0x201A


class Poller(Protocol):
    """Tells the owners of descriptors when they are ready. A mask is a hint: only a system call tells the truth.

    pulse: called after each wait, before anybody is told of anything, and by who speaks after a silence.
    """

    pulse: Callable[[], None]

    def watch(self, fd: int, handler: ReadyHandler, *, writing: bool = False) -> None:
        """Tell `handler` once each time that there is news: new bytes, the end, and, when `writing`, room to write.

        Bytes that are left unread are no news, nor is room that was there before.
        """
        ...

    def watch_level(self, fd: int, handler: ReadyHandler) -> None:
        """Tell `handler` as long as there is something to read."""
        ...

    def want_write(self, fd: int) -> None:
        """From now on tell of room to write as well, and of what is there already."""
        ...

    def hand_over(self, fd: int, handler: ReadyHandler) -> None:
        """Another one is told from now on. Costs no system call."""
        ...

    def unwatch(self, fd: int) -> None:
        """Tell nobody any more. Without effect on what is not watched."""
        ...

    def closing(self, fd: int) -> None:
        """The same for a descriptor that is closed right after: closing it is enough for the kernel."""
        ...

    def at_least(self, sock: socket, count: int) -> bool:
        """Tell of bytes only when there are so many, or the end. Lowering it tells of what is there already.

        Returns False where that cannot be had, and every byte is news.
        """
        ...

    def again(self, handler: ReadyHandler) -> None:
        """Call `handler` with 0 in the next turn: it has more to do, and let the others have theirs."""
        ...


class Progress(NamedTuple):
    """How far a connection came that the kernel carries. up, down: bytes of payload, what was sent again among them;
    heard: the client has sent something; over: nothing more will come; reset: one end reset it, "client" or "proxy", ""
    for none; packets: in all; last: when one came last, seconds of CLOCK_MONOTONIC, 0 for never.

    In the client's sequence numbers, 0 for what is not known yet: acknowledged, nxt: what it acknowledged of what was
    sent to it, and the number behind all that was; expected, received: the same of what it sent.
    """

    up: int
    down: int
    heard: bool
    over: bool
    reset: str
    packets: int
    last: float
    acknowledged: int
    nxt: int
    expected: int
    received: int


class Spares(Protocol):
    """Sockets that are as new, for who makes sockets."""

    def keep(self, sock: socket) -> bool:
        """Take one. Returns whether it is kept; there are enough others else, or few descriptors left."""
        ...

    def close(self) -> None:
        """Close those that are kept."""
        ...


class Offload(Protocol):
    """Has the kernel carry connections whose bytes need nobody to look at them: client and proxy talk to each other.

    descriptors: to be watched as long as it is not closed, for `too_big`; spares: where sockets go that are needed no
    more, None for nowhere.
    """

    descriptors: Sequence[int]
    spares: Spares | None

    def take(
        self, sock: socket, address: str, port: int, unread: int, offer: Offer, stamp: int
    ) -> tuple[int, Terms] | None:
        """Make one connection of a client's and of `sock`, which the outbound has just connected.

        address, port: of its other end, "" to be asked for; unread: bytes that wait in it and are nobody's any more;
        offer: of the client's SYN; stamp: the timestamp of the SYN-ACK. Returns (place, terms): the client is to be
        answered on these terms, and `sock` to be kept until `release`. None when the two do not fit together, or
        the destination has spoken already; `sock` is as before then.
        """
        ...

    def ended(self) -> list[int]:
        """Places of connections of which there is news: both ends closed, or one reset. Each may come twice."""
        ...

    def read(self, place: int) -> Progress:
        """How far the connection at `place` came."""
        ...

    def is_heard(self, place: int) -> bool:
        """Whether the client has said anything since it was answered."""
        ...

    def release(self, places: Sequence[int]) -> None:
        """Carry these no more; the places are free."""
        ...

    def spare(self, sock: socket) -> bool:
        """Make a socket whose place was released as new, and have it kept for another connection.

        Returns whether it is kept; it is to be closed otherwise.
        """
        ...

    def reset(self, place: int) -> None:
        """Tell the proxy that the connection is no more."""
        ...

    def finish(self, place: int) -> tuple[int, int] | None:
        """Tell the proxy that the client will say no more; the client is to be told the same of the proxy.

        Both will close then, and this may be said again until they have. Only where nothing is on its way. Returns the
        timestamps of the segment for the client (value, echo), None where there are none.
        """
        ...

    def too_big(self, descriptor: int) -> list[tuple[int, int, int]]:
        """What a descriptor that is readable tells: (place, number, mtu), the client's segment with this sequence
        number is more than the way to the proxy takes, which are `mtu` bytes."""
        ...

    def follow(self, ways: Mapping[str, str]) -> None:
        """Tell by which interface each address of a proxy, a literal, is reached now."""
        ...


class SocketFactory(Protocol):
    """Makes ztun's own sockets: non-blocking and marked (SO_MARK, or IP_BOUND_IF) so that they are never captured.

    One that has an attribute `dead`, a set of address literals, says by it that sockets which the kernel gave one of
    these addresses lead nowhere: their link has no carrier.
    """

    def __call__(self, family: int, type: int) -> socket: ...


class NameStore(Protocol):
    """Keeps Fake-IP assignments across restarts. A slot is an index into the pool."""

    def load(self) -> Mapping[int, str]:
        """Slot -> name, least recently used first."""
        ...

    def save(self, slot: int, name: str) -> None: ...

    def close(self) -> None: ...
