"""Country of an address, from a MaxMind DB file (https://maxmind.github.io/MaxMind-DB/). Offline."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import maxminddb

from ztun.errors import ConfigError


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
        found = record.get("country") if isinstance(record, dict) else None
        code = found.get("iso_code") if isinstance(found, dict) else None
        return code.lower() if isinstance(code, str) else None

    def close(self) -> None:
        self._reader.close()
