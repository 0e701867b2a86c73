"""Countries in the kernel: a hundred thousand networks of a MaxMind DB file go into the tries, and decide there.

`pytest -s tests/platform/test_countries.py` prints the figures that docs/geoip.md has.
"""

from __future__ import annotations

import os
import random
import runpy
import time
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from lan_world import GO_ON, REDIRECT, Bench, frame, udp

from ztun.geoip import CountryDatabase
from ztun.rules import Network, Rule, Rules, compile_prefixes

# The writer of MaxMind DB files lies beside the tests of the configuration.
write_database: Callable[[Path, dict[str, Any]], None] = runpy.run_path(
    str(Path(__file__).parents[1] / "config" / "mmdb.py")
)["write_database"]

COUNT = 100_000
GERMANY, FRANCE = {"country": {"iso_code": "DE"}}, {"country": {"iso_code": "FR"}}
# Where the networks begin, how long they are, and a client of the family.
FAMILIES = {4: ("64.0.0.0", 24, "10.9.0.2"), 6: ("2400::", 48, "fd00:9::2")}


def networks(version: int) -> list[Network]:
    """Twice COUNT neighbours; every second one is German, so that no two can be put together."""
    first, length, _client = FAMILIES[version]
    start = ip_network(f"{first}/{length}")
    return [type(start)((int(start.network_address) + n * start.num_addresses, length)) for n in range(2 * COUNT)]


def resident() -> int:
    """Bytes of memory that this process has now (proc(5): the second figure is in pages)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kernel_memory(descriptor: int) -> int:
    """Bytes that a map takes in the kernel, as its fdinfo says."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines())
    return int(fields["memlock"])


@pytest.mark.parametrize("version", [4, 6])
def test_a_direct_country_of_a_hundred_thousand_networks_stays_in_the_kernel(
    bench: Bench, tmp_path: Path, version: int
) -> None:
    path = tmp_path / "country.mmdb"
    world = networks(version)
    write_database(path, {str(net): (GERMANY if n % 2 else FRANCE) for n, net in enumerate(world)})
    before, empty = resident(), kernel_memory(bench.objects.maps[f"prefixes{version}"])

    started = time.monotonic()
    database = CountryDatabase(path)
    german = database.networks_of({"de"})
    read = time.monotonic()
    rules = Rules([Rule("direct", geoip=("de",))], "office", database.country)
    table = compile_prefixes(rules, (), (), (), german.__getitem__)
    compiled = time.monotonic()
    bench.classifier.replace_rules(table)
    loaded = time.monotonic()

    kernel = kernel_memory(bench.objects.maps[f"prefixes{version}"]) - empty
    print(
        f"\nIPv{version}: {len(german['de'])} networks: read {read - started:.2f} s, compiled {compiled - read:.2f} s,"
        f" loaded {loaded - compiled:.2f} s; kernel {kernel / 1e6:.1f} MB, process {(resident() - before) / 1e6:.0f} MB"
    )
    assert len(german["de"]) == COUNT
    assert loaded - started < 30  # a few seconds where nothing else runs
    assert 0 < kernel < 200 * COUNT
    assert resident() - before < 2000 * COUNT

    client = FAMILIES[version][2]
    for n in random.Random(version).sample(range(2 * COUNT), 300):
        packet = frame(udp(client, str(world[n].network_address + 7), 443))
        assert bench.run(packet) == (GO_ON if n % 2 else REDIRECT), world[n]
    database.close()
