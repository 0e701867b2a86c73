"""What the BPF programs and Python share, read from bpf/shared.h so that every name stands in one place."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

import ztun
from ztun.errors import ZtunError

# The structs of the same names, and the types of keys and leaves, as the BPF target lays them out.
COUNTER = struct.Struct("=QQ")
SETTINGS = struct.Struct("=IIII")
DECISION = struct.Struct("=IiQ")
CLIENT = struct.Struct("=I6s2x")
PORT = struct.Struct("=6s2x")
FLOW = struct.Struct("!16s16sHH")
PIECE = struct.Struct("=16sI")
RECENT = struct.Struct("=16sIiII")
PREFIX_LENGTH = struct.Struct("=I")
I32 = struct.Struct("=i")
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")

# enum -> the constant COUNTER_… where it starts.
_COUNTED = {
    "verdict": "VERDICT",
    "drop_reason": "DROP",
    "pass_reason": "PASS",
    "xdp_reason": "XDP",
    "host_verdict": "HOST",
}
_ENUM = re.compile(r"^enum (\w+) \{(.*?)^\};", re.MULTILINE | re.DOTALL)
_ENUMERATOR = re.compile(r"^\s*([A-Z]\w+),", re.MULTILINE)
_CONSTANT = re.compile(r"^#define (\w+) (-?\d+)$", re.MULTILINE)


class Shared(NamedTuple):
    """enums: enum name -> its enumerators in order; constants: macro name -> number."""

    enums: dict[str, list[str]]
    constants: dict[str, int]

    def counter_names(self) -> dict[int, str]:
        """Index in the map `counters` -> the name it is shown under, e.g. "direct" or "drop_truncated"."""
        names = {}
        for enum, start in _COUNTED.items():
            for position, enumerator in enumerate(self.enums[enum]):
                name = enumerator.lower().removeprefix("verdict_")
                names[self.constants[f"COUNTER_{start}"] + position] = name
        return names


def find_sources() -> Path:
    """The directory of the BPF sources: ztun/_bpf where installed, bpf/ in a checkout.

    Raises ZtunError when neither is there.
    """
    package = Path(ztun.__file__).resolve().parent
    for candidate in (package / "_bpf", package.parent / "bpf"):
        if (candidate / "classify.c").is_file():
            return candidate
    raise ZtunError(f"the BPF sources are missing from {package / '_bpf'}: install ztun anew")


def read_shared(directory: Path) -> Shared:
    """Read shared.h of `directory`."""
    text = (directory / "shared.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    enums = {}
    for name, body in _ENUM.findall(text):
        # The last enumerator of the reasons is their number.
        enums[name] = [one for one in _ENUMERATOR.findall(body) if not one.endswith("_REASONS")]
    return Shared(enums, {name: int(number) for name, number in _CONSTANT.findall(text)})
