"""One peer in a process of its own: `python -m bench.peer tun2socks|gvisor|system|mixed DEVICE PROXY-URL`.

The Python wheels carry the Go programs xjasonlyu/tun2socks and SagerNet/sing-tun. Runs until SIGTERM ends it.
"""

from __future__ import annotations

import signal
import sys

MTU = 65535
SESSIONS = 16_384  # the most it takes; the default of 1,024 would refuse 10,000 flows


def run_tun2socks(device: str, proxy: str) -> None:
    """Blocks. It opens the device with IFF_VNET_HDR and TSO by itself; TCP buffers left to auto-tuning."""
    import tun2socks

    tun2socks.startFromArgs(f"tun://{device}", "", "error", proxy, "", "", "", True)


def run_sing_tun(stack: str, device: str, proxy: str) -> None:
    import sing_tun

    options = {
        "Name": device,
        "MTU": MTU,
        "GSO": True,
        "AutoRoute": False,
        "Inet4Address": ["172.31.0.1/30"],
        "Inet6Address": ["fdfe:dcba:9876::1/126"],
    }
    config = sing_tun.Config(proxy=proxy, stack=stack, tun_options=options, max_sessions=SESSIONS)
    with sing_tun.Engine(config):
        signal.pause()


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    program, device, proxy = sys.argv[1:]
    if program == "tun2socks":
        run_tun2socks(device, proxy)
    else:
        run_sing_tun(program, device, proxy)


if __name__ == "__main__":
    main()
