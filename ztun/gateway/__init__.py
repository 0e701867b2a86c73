"""The engine: device <-> stack <-> relay <-> outbound, the DNS service, statistics."""
