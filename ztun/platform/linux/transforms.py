"""Whether this host transforms packets on their way out: policies of IPsec, which a redirected packet would pass by.

Sources: include/uapi/linux/xfrm.h, netlink(7).
"""

from __future__ import annotations

import socket
import struct

_NETLINK_XFRM = 6
_GET_INFO = 0x25  # XFRM_MSG_GETSPDINFO
_NEW_INFO = 0x24
_REQUEST = 1  # NLM_F_REQUEST
_INFO = 1  # XFRMA_SPD_INFO
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_COUNTS = struct.Struct("=6I")  # struct xfrmu_spdinfo: policies in, out, forward, and those of sockets
_ANSWER_SIZE = 4096


def has_policies() -> bool:
    """Whether there is an IPsec policy for what leaves this network namespace. False where the kernel has none of it.

    Raises OSError when the kernel does not say.
    """
    try:
        asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_XFRM)
    except OSError:
        return False
    with asking:
        asking.settimeout(1)  # it answers at once
        asking.send(_HEADER.pack(_HEADER.size + 4, _GET_INFO, _REQUEST, 1, 0) + bytes(4))
        return _outgoing(asking.recv(_ANSWER_SIZE)) > 0


def _outgoing(answer: bytes) -> int:
    """The number of policies for packets that leave. Raises OSError for an answer that is an error."""
    length, kind, _, _, _ = _HEADER.unpack_from(answer)
    if kind != _NEW_INFO:
        raise OSError(-int.from_bytes(answer[16:20], "little", signed=True), "no count of IPsec policies")
    at = _HEADER.size + 4  # behind the flags
    while at + _ATTRIBUTE.size <= length:
        size, name = _ATTRIBUTE.unpack_from(answer, at)
        if name == _INFO:
            return int(_COUNTS.unpack_from(answer, at + _ATTRIBUTE.size)[1])
        at += max((size + 3) & ~3, _ATTRIBUTE.size)
    return 0
