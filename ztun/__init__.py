"""ztun, a transparent-proxy gateway: eBPF classifies, a user-space stack carries the rest through proxies."""

__version__ = "0.1.0"
