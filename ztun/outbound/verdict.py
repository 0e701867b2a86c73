"""What becomes of datagrams at an outbound, and what a proxy has shown of its being able to carry them."""

from __future__ import annotations

from typing import Any, Literal

import structlog

from ztun.ports import Failure, OutboundError

log = structlog.get_logger("ztun.outbound")

DatagramVerdict = Literal["proxy", "reject", "direct"]

_SURE = 300.0  # seconds for which a proxy is not asked again that said it does not do this
_DOUBT, _MOST_DOUBT = 1.0, 300.0  # the same for one that only failed to: at first, and doubled each time up to the last


class Datagrams:
    """The verdict of one outbound about datagrams, and its figures.

    verdict: "proxy" asks the proxy to carry them, "reject" refuses them, "direct" sends them past the proxy. reason:
    why they are refused, where they are from the beginning. opened, lost: links that came about, and those of them that
    died; refused: first datagrams of sessions that were answered at once, without asking the proxy.
    """

    def __init__(self, tag: str, verdict: DatagramVerdict, reason: str | None = None) -> None:
        self.verdict = verdict
        self.opened = 0
        self.lost = 0
        self.refused = 0
        self.works = False  # the proxy carried datagrams, and has not said since that it does not
        self._tag = tag
        self._refusal = (Failure.UNSUPPORTED, reason) if reason is not None else None
        self._until = float("inf") if reason is not None else 0.0
        self._is_forever = reason is not None
        self._doubt = _DOUBT
        self._told: str | None = None

    def refusal(self, now: float) -> OutboundError | None:
        """Why a link need not be asked for now, or None. now: seconds of a clock that only goes on."""
        if self._refusal is None or now >= self._until:
            return None
        failure, reason = self._refusal
        self._tell(reason)
        return OutboundError(failure, reason)

    def refuse(self, failure: Failure, reason: str, now: float, *, sure: bool) -> OutboundError:
        """The proxy did not grant a link, and is not asked again for a while. Returns what to raise.

        sure: it said that it never does; otherwise one that never did is thought unable, for longer and longer.
        """
        wait = _SURE if sure else self._doubt
        if not sure:
            self._doubt = min(2 * self._doubt, _MOST_DOUBT)
        self.works = False
        self._refusal = failure, reason
        self._until = now + wait
        self._tell(reason)
        return OutboundError(failure, reason)

    def granted(self) -> None:
        """A link came about."""
        self.opened += 1
        self.works = True
        self.forget()
        self._told = None

    def forget(self) -> None:
        """The proxy may be asked again at once."""
        if not self._is_forever:
            self._refusal = None
            self._doubt = _DOUBT

    def describe(self, now: float) -> dict[str, Any]:
        """For `status --json`: verdict, opened, lost, refused, and reason, None when datagrams are not refused now."""
        is_refused = self._refusal is not None and now < self._until
        reason = self._refusal[1] if self._refusal is not None and is_refused else None
        return {
            "verdict": self.verdict, "opened": self.opened, "lost": self.lost, "refused": self.refused,
            "reason": reason,
        }  # fmt: skip

    def _tell(self, reason: str) -> None:
        """Say it once in the log, and again only when it is another reason or worked meanwhile."""
        if self._told != reason:
            self._told = reason
            say = log.info if self._is_forever else log.warning
            say("datagrams are refused", outbound=self._tag, reason=reason)
