"""What becomes of datagrams at an outbound, and what a proxy has shown of its being able to carry them."""

from __future__ import annotations

from typing import Any, Literal

import structlog

from ztun.ports import Failure, OutboundError

log = structlog.get_logger("ztun.outbound")

DatagramVerdict = Literal["proxy", "reject", "direct"]

_SURE = 300.0  # seconds for which a proxy is not asked again that said it does not do this
_DOUBT, _MOST_DOUBT = 1.0, 300.0  # the same for one that only failed to: at first, and doubled each time up to the last
_PATIENCE = 30.0  # seconds for which one that could may fail to before it is thought unable


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
        self._works = False  # the proxy granted links, and nothing has shown since that it does not any more
        self._failing_since: float | None = None
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

    def refuse(self, failure: Failure, reason: str, now: float) -> OutboundError:
        """The proxy said that it never grants a link, and is not asked again for a while. Returns what to raise."""
        return self._remember(failure, reason, now + _SURE)

    def fail(self, error: OutboundError, now: float) -> OutboundError:
        """The proxy was asked and did not grant a link, for whatever reason. Returns what to raise.

        That is a trouble that passes if it granted some before; else, or if the trouble lasts, the proxy is thought
        unable, and left alone for longer and longer.
        """
        if self._works:
            self._failing_since = now if self._failing_since is None else self._failing_since
            if now < self._failing_since + _PATIENCE:
                return error
        if now < self._until:  # several asked at once, and this is the same news again
            return OutboundError(Failure.UNSUPPORTED, str(error))
        wait, self._doubt = self._doubt, min(2 * self._doubt, _MOST_DOUBT)
        return self._remember(Failure.UNSUPPORTED, str(error), now + wait)

    def granted(self) -> None:
        """A link came about."""
        self.opened += 1
        self._works = True
        self._failing_since = None
        self.forget()
        self._told = None

    def forget(self) -> None:
        """The proxy may be asked again at once."""
        if not self._is_forever:
            self._refusal = None
            self._until = 0.0
            self._doubt = _DOUBT

    def describe(self, now: float) -> dict[str, Any]:
        """For `status --json`: verdict, opened, lost, refused, and reason, None when datagrams are not refused now."""
        is_refused = self._refusal is not None and now < self._until
        reason = self._refusal[1] if self._refusal is not None and is_refused else None
        return {
            "verdict": self.verdict, "opened": self.opened, "lost": self.lost, "refused": self.refused,
            "reason": reason,
        }  # fmt: skip

    def _remember(self, failure: Failure, reason: str, until: float) -> OutboundError:
        self._works = False
        self._refusal = failure, reason
        self._until = until
        self._tell(reason)
        return OutboundError(failure, reason)

    def _tell(self, reason: str) -> None:
        """Say it once in the log, and again only when it is another reason or worked meanwhile."""
        if self._told != reason:
            self._told = reason
            say = log.info if self._is_forever else log.warning
            say("datagrams are refused", outbound=self._tag, reason=reason)
