"""What follows from this host's addresses: its networks in the rules and prefix tables, and where it answers DNS."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import structlog

from ztun import machine
from ztun.errors import ZtunError
from ztun.ports import Classifier
from ztun.rules import CountryPrefixes, Network, Rules, Surroundings, compile_prefixes, make_surroundings

log = structlog.get_logger("ztun.network")

_LINK_LOCAL6 = b"\xfe\x80"  # fe80::/10 is direct in any case; these addresses come and go with every flap


class Decides(Protocol):
    def replace_rules(self, rules: Rules) -> None: ...


class Placement:
    """Places the rules among this host's networks, and again whenever those change.

    fake_ranges: the Fake-IP ranges; countries: the networks of a country code.
    """

    def __init__(self, rules: Rules, fake_ranges: Iterable[Network], countries: CountryPrefixes) -> None:
        self.prefixes = 0
        self.rules = rules
        self._fake_ranges = tuple(fake_ranges)
        self._countries = countries
        self._installed: Rules | None = None

    @property
    def is_installed(self) -> bool:
        """Whether everybody has `rules` already."""
        return self._installed is self.rules

    def place(self, addresses: Iterable[machine.InterfaceAddress]) -> None:
        """Make `rules` those of a host with these addresses; the same object when that changes nothing."""
        around = self._surroundings(addresses)
        if around != self.rules.surroundings:
            self.rules = self.rules.placed_in(around)

    async def install(self, classifier: Classifier, deciders: Iterable[Decides] = ()) -> None:
        """Give the tables and everybody who decides the rules as they are placed now. Raises ZtunError."""
        rules = self.rules
        around = rules.surroundings
        # Country tables make it seconds of work, which the flows must not wait for.
        prefixes = await asyncio.to_thread(
            compile_prefixes, rules, around.builtin_direct, around.own_networks, around.fake_ranges, self._countries
        )
        for _ in classifier.replacing_rules(prefixes):
            await asyncio.sleep(0)
        self.prefixes = len(prefixes)
        for decider in deciders:
            decider.replace_rules(rules)
        self._installed = rules

    def _surroundings(self, addresses: Iterable[machine.InterfaceAddress]) -> Surroundings:
        found = {
            (entry.address, entry.length)
            for entry in addresses
            if not (len(entry.address) == 16 and entry.address.startswith(_LINK_LOCAL6))
        }
        return make_surroundings(sorted(found), self._fake_ranges)


class Listening:
    """Answers DNS on addresses as they appear.

    wanted: endpoints as in `dns.listen`; None: port 53 of each address of the LAN interfaces.
    start: DnsService.start; taken: endpoints that are known not to be free.
    """

    def __init__(
        self,
        wanted: Sequence[str] | None,
        lan: Sequence[str],
        start: Callable[[Sequence[str]], Awaitable[None]],
        taken: Iterable[str] = (),
    ) -> None:
        self.endpoints: list[str] = []
        self._told = set(taken)
        self._wanted = wanted
        self._lan = lan
        self._start = start

    async def begin(self, endpoints: Iterable[str]) -> None:
        """Listen there, now. Raises ZtunError."""
        found = list(endpoints)
        await self._start(found)
        self.endpoints += found

    async def follow(self, addresses: Sequence[machine.InterfaceAddress]) -> None:
        """Listen on what is wanted and can be had since these are our addresses. A socket outlives its address."""
        for text in [text for text in self._candidates(addresses) if text not in self.endpoints]:
            try:
                await self.begin([text])
            except ZtunError as error:
                if text not in self._told:
                    self._told.add(text)
                    log.warning("not answering DNS there", at=text, reason=str(error))
            else:
                log.info("answering DNS there too", at=text)

    def _candidates(self, addresses: Sequence[machine.InterfaceAddress]) -> list[str]:
        if self._wanted is None:
            ours = [entry.ip for entry in addresses if entry.ifname in self._lan and not entry.ip.is_link_local]
            return [machine.format_endpoint(address, machine.DNS_PORT) for address in ours]
        own = {entry.ip for entry in addresses}
        return [text for text in self._wanted if machine.parse_endpoint(text)[0] in own]
