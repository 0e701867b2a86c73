"""For tests of users who are not root: what they may read and open on a machine of people is not so everywhere."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
# The device as udev makes it, and a checkout ($0) that everybody can read, which those who run the tests may not have.
_SCRIPT = """
mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200
top=/$(echo "$0" | cut -d / -f 2)
case $(stat -c %a "$top") in
    *[1357]) ;;
    *) mount --bind "$0" /mnt && mount -t tmpfs -o mode=755 tmpfs "$top" && mkdir -p "$0" && mount --bind /mnt "$0" ;;
esac
cd / && exec "$@"
"""
OPEN_TO_ALL = ("unshare", "--mount", "sh", "-c", _SCRIPT, str(_ROOT))
"""In front of a command."""
