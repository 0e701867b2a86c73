"""Be the internet of the laboratory until killed: `ztun.lab.servers` on the addresses of `ztun.lab.plan`.

Run by the unit lab.service in the virtual machine "upstream"; ends as soon as one of the servers does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ztun.lab import internet
from ztun.lab.servers import servers

DIRECTORY = Path("/run/lab")  # RuntimeDirectory= of the unit


def main() -> int:
    subprocess.run(["ip", "-force", "-batch", "-"], input="\n".join(internet.ip_commands()), text=True, check=False)
    subprocess.run(["nft", "delete table ip lab"], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["nft", internet.SILENCE], check=True)
    running = {subprocess.Popen(server.argv).pid: server.name for server in servers(DIRECTORY)}
    (DIRECTORY / "files" / "1M").write_bytes(os.urandom(1 << 20))
    while (ended := os.wait())[0] not in running:
        pass
    print(f"{running[ended[0]]} ended with status {ended[1]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
