"""Country of an address, from a MaxMind DB file (https://maxmind.github.io/MaxMind-DB/). Offline."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import maxminddb

from ztun.errors import ConfigError
from ztun.rules import Network


class CountryDatabase:
    """Looks up the ISO 3166-1 alpha-2 code, in lower case, of packed addresses. Raises ConfigError naming the key."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = maxminddb.open_database(path, maxminddb.MODE_AUTO)
        except OSError as error:
            raise ConfigError(f"route.geoip_database: cannot read {path}: {error.strerror or error}") from None
        except (maxminddb.InvalidDatabaseError, ValueError):
            raise ConfigError(
                f"route.geoip_database: {path} is not a MaxMind DB file; give one of countries, ending in .mmdb"
            ) from None

    def country(self, address: bytes) -> str | None:
        """The country code, None where the file knows none."""
        try:
            record = self._reader.get(ip_address(address))
        except (ValueError, maxminddb.InvalidDatabaseError):  # an IPv6 address in an IPv4 database, a damaged record
            return None
        return _code_of(record)

    def networks_of(self, codes: Collection[str]) -> dict[str, list[Network]]:
        """The networks of each country code, in one pass over the file, which takes seconds for all the world.

        Ranges that the file gives as another name for IPv4 (6to4 and the like) are not among them.
        """
        found: dict[str, list[Network]] = {code: [] for code in codes}
        try:
            for network, record in self._reader:
                code = _code_of(record)
                if code in found:
                    found[code].append(network)
        except (ValueError, maxminddb.InvalidDatabaseError) as error:
            raise ConfigError(f"route.geoip_database: is damaged: {error}; get it anew") from None
        return found

    def close(self) -> None:
        self._reader.close()


def _code_of(record: Any) -> str | None:
    country = record.get("country") if isinstance(record, dict) else None
    code = country.get("iso_code") if isinstance(country, dict) else None
    return code.lower() if isinstance(code, str) else None
