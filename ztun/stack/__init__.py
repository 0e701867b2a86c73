"""The transport stack: TCP, UDP and ICMP over IPv4 and IPv6, without clocks, sockets or an event loop.

Packets go in through `Stack.receive`, packets come out in `Stack.outbox`; time is an argument. What arrives for the
application is handed to a `Listener` and, per TCP connection, to a `Handler`.
"""

from ztun.stack.buffers import BufferPool
from ztun.stack.connection import Connection
from ztun.stack.handler import Handler
from ztun.stack.header import DatagramHeader, reverse
from ztun.stack.listener import Datagram, Listener
from ztun.stack.settings import StackSettings
from ztun.stack.stack import Stack
from ztun.stack.state import Closed, State

__all__ = [
    "BufferPool",
    "Closed",
    "Connection",
    "Datagram",
    "DatagramHeader",
    "Handler",
    "Listener",
    "Stack",
    "StackSettings",
    "State",
    "reverse",
]
