"""`python -m fuzz [TARGET…] [--seconds N]`: every target for so long, guided by coverage where atheris is installed.

What an input found is kept in fuzz/corpus, what broke something in fuzz/crashes; `python -m fuzz TARGET --file CRASH`
runs it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import subprocess
import sys
import time
from pathlib import Path

_HERE = Path(__file__).parent
_RUNS = re.compile(r"(?:Done|stat::number_of_executed_units:) (\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (default 60)")
    parser.add_argument("--file", type=Path, help="run this one input, and show what it does")
    parser.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.guided:
        _run_guided(options.targets[0], options.seconds)
        return
    from fuzz.targets import TARGETS

    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    if options.file is not None:
        TARGETS[options.targets[0]].run(options.file.read_bytes())
        return
    run = _start_guided if importlib.util.find_spec("atheris") else _run_random
    broken = [name for name in options.targets or TARGETS if not run(name, options.seconds)]
    if broken:
        sys.exit(1)


def _start_guided(name: str, seconds: float) -> bool:
    """libFuzzer ends its process, so each target has one of its own."""
    command = [sys.executable, "-m", "fuzz", "--guided", name, "--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    runs = _RUNS.search(done.stdout)
    print(f"{name}: {runs[1] if runs else '?'} inputs, {'broken' if done.returncode else 'nothing found'}", flush=True)
    if done.returncode:
        print(done.stdout[-4000:])
    return not done.returncode


def _run_guided(name: str, seconds: float) -> None:
    import atheris

    with atheris.instrument_imports(include=["ztun"]):
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus, crashes = _HERE / "corpus" / name, _HERE / "crashes" / name
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-max_total_time={int(seconds)}", f"-max_len={target.size}", "-timeout=20", "-rss_limit_mb=1024"]
    arguments = [*limits, f"-artifact_prefix={crashes}/", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *arguments], target.run)
    atheris.Fuzz()


def _run_random(name: str, seconds: float) -> bool:
    """Without coverage: seeds, mutated, and noise."""
    from fuzz.targets import TARGETS

    target = TARGETS[name]
    chance = random.Random(name)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        data = bytearray(chance.choice([*target.seeds, b""]) + chance.randbytes(chance.randrange(target.size)))
        for _ in range(chance.randrange(8)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        count += 1
        try:
            target.run(bytes(data[: target.size]))
        except Exception:
            crashes = _HERE / "crashes" / name
            crashes.mkdir(parents=True, exist_ok=True)
            (crashes / f"random-{count}").write_bytes(data[: target.size])
            print(f"{name}: broken by input {count}, kept as {crashes}/random-{count}", flush=True)
            raise
    print(f"{name}: {count} inputs (not guided), nothing found", flush=True)
    return True


if __name__ == "__main__":
    main()
