"""How many lookups a second the prefix table in Python makes: `python -m bench.lookups [--prefixes 10000]`.

CPU time, so that it can be measured on a machine that others use as well. The promise is 300,000 a second on 10,000
prefixes; `whole packet` is what macOS pays for each packet, from the first byte of its header to its counters.
"""

from __future__ import annotations

import argparse
import random
import struct
import time
from collections.abc import Callable

from ztun.platform.darwin.classifier import Decider
from ztun.platform.darwin.table import PrefixTable
from ztun.ports import Prefix, Verdict
from ztun.wire import ip

PROMISED = 300_000


def make_prefixes(count: int, size: int, seed: int = 1) -> list[Prefix]:
    """Nested prefixes of all lengths, as a list of countries and sites has them."""
    random_ = random.Random(seed)
    found = {(bytes(size), 0): Prefix(bytes(size), 0, Verdict.TUNNEL, -1)}
    bits = size * 8
    while len(found) < count:
        length = random_.choice([8, 12, 16, 18, 20, 22, 24, 24, 24, 28, 32] if size == 4 else [32, 40, 48, 48, 56, 64])
        network = (random_.getrandbits(length) << bits - length).to_bytes(size)
        found[network, length] = Prefix(network, length, random_.choice(list(Verdict)), random_.randrange(50))
    return list(found.values())


def rate(call: Callable[[bytes], object], arguments: list[bytes]) -> float:
    """Calls in a second of CPU time."""
    for one in arguments[:1000]:
        call(one)
    start = time.process_time()
    for one in arguments:
        call(one)
    return len(arguments) / (time.process_time() - start)


def measure(prefixes: int, lookups: int, size: int) -> dict[str, float]:
    """Rates of: the table alone, with learned addresses and counting, and the whole packet."""
    random_ = random.Random(2)
    compiled = make_prefixes(prefixes, size)
    table = PrefixTable(size)
    table.replace(compiled)
    decider = Decider(hijack_dns=True)
    decider.tables[size] = table
    addresses = [random_.randbytes(size) for _ in range(lookups)]
    source = b"\x0a\0\0\2" if size == 4 else b"\xfd" + bytes(14) + b"\2"
    payload = struct.pack("!HHHH", 4321, 443, 108, 0) + bytes(100)
    packets = [ip.header(source, address, ip.UDP, len(payload)) + payload for address in addresses]
    views = [memoryview(packet) for packet in packets]
    return {
        "table": rate(table.find, addresses),
        "lookup": rate(decider.lookup, addresses),
        "whole packet": rate(decider.classify, views),  # type: ignore[arg-type]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", type=int, default=10_000)
    parser.add_argument("--lookups", type=int, default=200_000)
    given = parser.parse_args()
    for size, name in ((4, "IPv4"), (16, "IPv6")):
        for what, figure in measure(given.prefixes, given.lookups, size).items():
            print(f"{name} {what:13} {figure:12,.0f} 1/s of CPU time, {given.prefixes} prefixes")


if __name__ == "__main__":
    main()
