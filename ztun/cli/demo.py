"""`ztun demo`: a client, a gateway and an internet in network namespaces, and what ztun does there, step by step.

Nothing outside those namespaces is touched, and they are gone at the end, also after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ztun.errors import ZtunError
from ztun.lab import Lab, Ztun, plan
from ztun.lab.servers import SOCKS_UDP

RULES: list[dict[str, Any]] = [
    {"domain_suffix": ["direct.test"], "outbound": "direct"},
    {"domain_keyword": ["telemetry"], "outbound": "block"},
    {"ip_cidr": [f"{plan.BLOCKED4}/32"], "outbound": "block"},
    {"domain": ["web.test"], "outbound": "http-auth"},
    {"ip_cidr": ["203.0.113.0/24", "2001:db8::/48"], "outbound": "socks-udp"},
    {"domain_suffix": ["test"], "outbound": "socks"},
]
_PROXY = (plan.UPSTREAM4, plan.UPSTREAM6)
_CLIENT = (plan.CLIENT4, plan.CLIENT6)
_WHO = {
    **dict.fromkeys(_CLIENT, "the client itself"),
    **dict.fromkeys(_PROXY, "the proxy"),
    plan.GATEWAY_WAN4: "the gateway",
}
_MEGABYTES = 512


def run_demo() -> int:
    """Show it all. Returns the exit code: 0 when every step went as it should. Raises ZtunError without root."""
    if os.geteuid() != 0:
        raise ZtunError("the demo makes network namespaces, which needs root; run it with sudo")
    console = Console(highlight=False)
    began = time.monotonic()
    try:
        with Lab() as lab:
            demo = Demo(console, lab)
            demo.run()
    except KeyboardInterrupt:
        console.print("\ninterrupted; everything is removed again")
        return 130
    except (RuntimeError, OSError) as error:
        raise ZtunError(f"the demo could not go on: {error}") from error
    elapsed = time.monotonic() - began
    console.print(f"\n[dim]{elapsed:.0f} s; namespaces, servers and everything ztun installed are removed again[/]")
    if demo.surprises:
        console.print(f"[red]{demo.surprises} steps did not go as they should[/]")
    return 1 if demo.surprises else 0


class Demo:
    """The steps. Each prints what it does, what came of it, and whether that is what should."""

    def __init__(self, console: Console, lab: Lab) -> None:
        self._console = console
        self._lab = lab
        self.surprises = 0

    def run(self) -> None:
        self._title("Three namespaces: client – gateway – internet, with real servers")
        self._say(
            f"client {plan.CLIENT4} ── gateway {plan.GATEWAY_LAN4} | {plan.GATEWAY_WAN4} ── internet {plan.UPSTREAM4}"
        )
        self._say(f"nginx on {plan.SITE4} and {plan.DIRECT4}; microsocks, {SOCKS_UDP}, tinyproxy on {plan.UPSTREAM4}")
        self._page("without ztun the gateway just routes", f"http://{plan.SITE4}/", _CLIENT)

        self._title("ztun up --config FILE, on the gateway")
        instance = self._lab.ztun({"route": {"rules": RULES}})
        self._text(instance.output)

        self._names()
        self._pages()
        self._blocks()
        self._speed()
        self._inside(instance)

        self._title("SIGTERM")
        code = instance.stop(signal.SIGTERM)
        self._check(code == 0, f"ended with exit code {code}")
        self._page("the gateway just routes again", f"http://{plan.SITE4}/", _CLIENT)

    def _names(self) -> None:
        self._title("Names: proxied ones get a Fake-IP, direct ones their real address")
        fake, fake6 = self._lab.dig("site.test"), self._lab.dig("site.test", "AAAA")
        self._check(fake.startswith("198.18."), f"dig site.test           {fake} and {fake6}")
        self._check(self._lab.dig("-x", fake) == "site.test.", f"dig -x {fake:<16} site.test.")
        elsewhere = self._lab.dig(f"@{plan.RESOLVER_ELSEWHERE4}", "site.test")
        self._check(
            elsewhere == fake, f"dig @{plan.RESOLVER_ELSEWHERE4} site.test   {elsewhere}  (hijacked on its way)"
        )
        real = self._lab.dig("direct.test")
        self._check(real == plan.DIRECT4, f"dig direct.test         {real}")

    def _pages(self) -> None:
        self._title("Pages: whom does the server see?")
        self._page("by name, through SOCKS5; the proxy resolves it", "http://site.test/", _PROXY)
        self._page("the same with TLS", "https://secure.test/", _PROXY)
        self._page("by name, through HTTP CONNECT with a password", "http://web.test/", _PROXY)
        self._page("an address in a proxied network", f"http://{plan.SITE4}/", _PROXY)
        self._page("the same over IPv6", f"http://[{plan.SITE6}]/", _PROXY)
        self._page("a direct name; ztun never sees its packets", "http://direct.test/", _CLIENT)

    def _blocks(self) -> None:
        self._title("Blocked")
        answer = self._lab.client.run("dig", "telemetry.test").stdout
        self._check("NXDOMAIN" in answer, "dig telemetry.test      NXDOMAIN")
        done = self._lab.curl(f"http://{plan.BLOCKED4}/", check=False, timeout=1)
        self._check(done.returncode == 28, f"http://{plan.BLOCKED4}/    no answer: dropped in the kernel, by BPF")
        done = self._lab.curl(f"http://site.test:{plan.CLOSED_PORT}/", check=False, timeout=3)
        self._check(done.returncode == 7, f"http://site.test:{plan.CLOSED_PORT}/  refused there, so refused here")

    def _speed(self) -> None:
        self._title("Throughput of one TCP connection")
        self._lab.file(_MEGABYTES)
        path = f"/files/{_MEGABYTES}M"
        for what, address in (("through ztun and SOCKS5", plan.SITE4), ("direct, plain forwarding", plan.DIRECT4)):
            done = self._lab.curl("-o", "/dev/null", "-w", "%{speed_download}", f"http://{address}{path}", check=False)
            rate = float(done.stdout or 0) * 8 / 1e9
            self._check(done.returncode == 0, f"{what:<26} {rate:5.1f} Gbit/s")

    def _inside(self, instance: Ztun) -> None:
        self._title("ztun routes (an excerpt)")
        wide = {**os.environ, "COLUMNS": "120"}
        text = instance.command("routes", "--socket", str(instance.socket_path), env=wide).stdout
        self._text(_excerpt(text, ("Programs", "Map prefixes4", "Counters")))
        self._title("ztun status")
        self._text(instance.command("status", "--socket", str(instance.socket_path), env=wide).stdout)

    def _page(self, what: str, url: str, expected: tuple[str, ...]) -> None:
        """Fetch the page that tells whom the server sees."""
        seen = self._try(lambda: self._lab.page(url)["client"])
        who = _WHO.get(seen, "nobody we know")
        self._check(seen in expected, f"{url:<22} {what:<46} the server sees {seen}, {who}")

    def _try(self, action: Callable[[], str]) -> str:
        try:
            return action()
        except (RuntimeError, ValueError) as error:
            return str(error).splitlines()[-1]

    def _title(self, text: str) -> None:
        self._console.print(f"\n[bold cyan]▸ {escape(text)}[/]")

    def _say(self, text: str) -> None:
        self._console.print(f"  {escape(text)}")

    def _text(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            self._console.print(f"  [dim]│[/] {escape(line)}", soft_wrap=True)

    def _check(self, good: bool, text: str) -> None:
        self.surprises += not good
        mark = "[green]✓[/]" if good else "[red]✗[/]"
        self._console.print(f"  {mark} {escape(text)}", soft_wrap=True)


def _excerpt(text: str, titles: tuple[str, ...]) -> str:
    """The paragraphs that begin with one of `titles`."""
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph.lstrip().startswith(titles))


if __name__ == "__main__":
    try:
        sys.exit(run_demo())
    except ZtunError as failed:
        sys.exit(f"{Path(sys.argv[0]).name}: {failed}")
