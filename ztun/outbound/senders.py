"""Under which host to report a datagram that a proxy's relay brings."""

from __future__ import annotations

from ztun.outbound.tcp import is_literal
from ztun.ports import Destination


class Senders:
    """Remembers what was sent to, so that an answer can be told under the host that the client knows.

    The proxy resolves names, but names the sender of an answer by its address, as a rule. The client never saw that
    address. So an answer from an address that nobody sent to is taken for one from the name that was sent to on the
    same port; of several such names, for one from the name that waits longest for its first answer.
    """

    def __init__(self) -> None:
        self._hosts: dict[tuple[str, int], str] = {}  # what the proxy calls a sender -> the host that was sent to
        self._names: dict[int, list[str]] = {}  # port -> names that were sent to
        self._unanswered: dict[int, list[str]] = {}  # port -> those of them without an answer, oldest first

    def sent(self, destination: Destination) -> None:
        """Something goes to `destination`, for the first time."""
        host, port = destination
        self._hosts[host, port] = host
        if not is_literal(host):
            self._names.setdefault(port, []).append(host)
            self._unanswered.setdefault(port, []).append(host)

    def find(self, host: str, port: int) -> str:
        """The host to report for an answer that the proxy says is from `host`."""
        known = self._hosts.get((host, port))
        names = self._names.get(port)
        if not names:
            return known or host
        unanswered = self._unanswered[port]
        if known is None and is_literal(host):
            if len(names) == 1:
                return names[0]  # whichever of its addresses the proxy took
            if unanswered:
                known = self._hosts[host, port] = unanswered[0]
        if known in unanswered:
            unanswered.remove(known)
        return known or host

    def clear(self) -> None:
        self._hosts.clear()
        self._names.clear()
        self._unanswered.clear()
