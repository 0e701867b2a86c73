"""Compiles what packets pass through, when a wheel is made: mypyc makes C of the same sources (docs/compiling.md).

ZTUN_BUILD in the environment: `pure` leaves the wheel without; `compiled` raises where it cannot be done; `auto`, the
default, compiles where there is a C compiler with the headers of this Python, and leaves it where that fails.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Globs of sources. Whole packages where that can be: what inherits from a compiled class has to be compiled too.
MODULES = (
    "ztun/wire/*.py",
    "ztun/stack/*.py",
    "ztun/outbound/*.py",
    "ztun/gateway/*.py",
    "ztun/log/admission.py",
    "ztun/log/clean.py",
    "ztun/log/lines.py",
    "ztun/log/repeats.py",
    "ztun/names/pool.py",
    "ztun/platform/linux/clients.py",
    "ztun/platform/linux/frozen.py",
    "ztun/platform/linux/mapped.py",
    "ztun/platform/linux/offload.py",
    "ztun/platform/linux/poller.py",
    "ztun/platform/linux/sockets.py",
    "ztun/platform/linux/tun.py",
)
# Datagrams of outbounds: ctypes, where there is nothing to gain, and objects of which weak references are kept.
_LEFT_OUT = frozenset(f"ztun/outbound/{name}.py" for name in ("associate", "batch", "datagrams", "senders", "udp"))
_REQUIREMENTS = ["mypy>=2.4,<3", "setuptools>=68"]
# Nothing that is not here is looked at: the libraries that ztun uses are not installed where wheels are built.
_MYPY = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent", "--no-incremental"]
# -O2 takes twice as long and is no faster. mypyc asks for -Werror, which other compilers than its own do not deserve.
_FLAGS = ["-Wno-error"]
_OPTIMISATION = "1"


class Compiling(BuildHookInterface[Any]):
    PLUGIN_NAME = "custom"
    _target: Path | None = None  # where it is compiled

    def dependencies(self) -> list[str]:
        """What pip installs for the build besides the build backend."""
        return _REQUIREMENTS if _wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and put the extensions beside their sources. An editable install stays as it is written."""
        if version == "editable" or not _wanted():
            return
        self._target = Path(tempfile.mkdtemp(prefix="ztun-build-"))
        try:
            extensions = compile_all(Path(self.root), self._target)
        except (Exception, SystemExit) as error:  # mypyc ends the process where it finds a mistake
            shutil.rmtree(self._target, ignore_errors=True)
            if os.environ.get("ZTUN_BUILD") == "compiled":
                raise
            self.app.display_warning(f"ztun is not compiled, and slower for it: {error!r}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        for built in extensions:
            build_data["force_include"][str(built)] = str(built.relative_to(self._target / "lib"))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel holds them now."""
        if self._target is not None:
            shutil.rmtree(self._target, ignore_errors=True)


def _wanted() -> bool:
    """Raises ValueError for what ZTUN_BUILD cannot be."""
    wanted = os.environ.get("ZTUN_BUILD", "auto")
    if wanted not in ("auto", "compiled", "pure"):
        raise ValueError(f"ZTUN_BUILD={wanted}: it is auto, compiled or pure")
    return wanted == "compiled" or (wanted == "auto" and _can_compile())


def _can_compile() -> bool:
    if platform.python_implementation() != "CPython" or sys.platform != "linux":
        return False
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return shutil.which(compiler.split()[0]) is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def compile_all(root: Path, target: Path) -> list[Path]:
    """Compile the MODULES below `root`. Returns the extensions, which lie below `target`/lib as their sources do.

    Raises what mypyc and the C compiler raise.
    """
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    with chdir(root):
        sources = sorted({str(path) for pattern in MODULES for path in Path().glob(pattern)} - _LEFT_OUT)
        extensions = mypycify(
            [*_MYPY, f"--cache-dir={target / 'mypy'}", *sources],
            opt_level=_OPTIMISATION,
            debug_level="0",
            multi_file=True,
            target_dir=str(target / "c"),
            group_name="ztun",
        )
        for extension in extensions:
            extension.extra_compile_args += _FLAGS
        build = build_ext(Distribution({"name": "ztun", "ext_modules": extensions}))
        build.build_lib, build.build_temp = str(target / "lib"), str(target / "o")
        build.ensure_finalized()
        _compile_at_once()
        build.run()
    return sorted((target / "lib").rglob("*.so"))


def _compile_at_once() -> None:
    """Have as many C files compiled at a time as there are processors: nearly all of them belong to one extension."""
    from setuptools._distutils.ccompiler import CCompiler

    inner = CCompiler.compile

    def compile_sources(self: Any, sources: list[str], *args: Any, **kwargs: Any) -> list[str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(lambda source: inner(self, [source], *args, **kwargs), sources)
            return [one for made in objects for one in made]

    CCompiler.compile = compile_sources  # type: ignore[method-assign]
