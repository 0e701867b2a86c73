"""Compiling, loading, and choosing the backend when something is missing."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from lan_world import Bench, World, load_now, make_classifier

from ztun import ports
from ztun.errors import ConfigError, ZtunError
from ztun.platform.linux import backends, bpfcall, layout, loader, open_device
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.classifier import MAPS, PROGRAMS
from ztun.platform.linux.maps import Map
from ztun.platform.linux.tables import PrefixTable

Spoil = Callable[[str], None]

BEYOND = "if (*(int *)(long)skb->data == 1) return 1;"
CAPTURE = Capture("lo", (), 1, False, False, ())


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of bpf/ to spoil."""
    return Path(shutil.copytree(layout.find_sources(), tmp_path / "bpf"))


@pytest.fixture
def spoil_bcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Put a bcc on the path whose import runs the given text."""

    def spoil(text: str) -> None:
        (tmp_path / "bcc.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return spoil


def open_files() -> dict[int, str]:
    """Descriptor -> what it is, of this process."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            found[int(entry.name)] = str(entry.readlink())
    return found


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.fixture
def no_child_is_left() -> Iterator[None]:
    """Other modules of the same run may have servers of their own under this process."""
    before = children()
    yield
    assert children() <= before


def test_a_compile_error_is_one_line_with_its_place(sources: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (sources / "classify.c").write_text("int capture(struct __sk_buff *skb) { return nothing; }\n")
    with pytest.raises(ZtunError) as caught:
        load_now(sources, PROGRAMS, {})
    assert "main.c:1:45: error: use of undeclared identifier 'nothing'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_the_verifier_dislikes_is_one_line(sources: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (sources / "classify.c").write_text("int capture(struct __sk_buff *skb) { return *(int *)(long)skb->data; }\n")
    with pytest.raises(ZtunError, match=r"not loaded: .*R1 offset is outside of the packet") as caught:
        load_now(sources, ["capture"], {})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_compiler_stays_out_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/nowhere")
    load_now(layout.find_sources(), ["reply"], {"clients": MAPS["clients"]}).close()
    assert "bcc" not in sys.modules
    assert "libbcc" not in Path("/proc/self/maps").read_text()
    assert os.environ["BCC_KERNEL_SOURCE"] == "/nowhere"


@pytest.mark.usefixtures("no_child_is_left")
def test_nothing_is_left_of_loading_but_the_descriptors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = open_files()
    objects = load_now(layout.find_sources(), ["reply"], {"clients": MAPS["clients"]})
    added = open_files().keys() - before.keys()
    assert added == {*objects.programs.values(), *objects.maps.values()}
    assert not any(os.get_inheritable(fd) for fd in added)
    objects.close()
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_loading_needs_no_home_and_no_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    load_now(layout.find_sources(), ["reply"], {}).close()


def test_a_compiler_that_aborts_is_one_line(spoil_bcc: Spoil) -> None:
    spoil_bcc("import os; os.write(2, b'LLVM ERROR: out of memory\\nStack dump:\\n'); os.abort()")
    with pytest.raises(ZtunError) as caught:
        load_now(layout.find_sources(), PROGRAMS, MAPS)
    assert str(caught.value) == (
        "BPF programs not loaded: the compiler was ended by signal 6 (Aborted): LLVM ERROR: out of memory"
    )


def test_a_compiler_that_is_killed_is_one_line(spoil_bcc: Spoil) -> None:
    spoil_bcc("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ZtunError) as caught:
        load_now(layout.find_sources(), PROGRAMS, MAPS)
    assert str(caught.value) == "BPF programs not loaded: the compiler was ended by signal 9 (Killed)"


@pytest.mark.usefixtures("no_child_is_left")
def test_too_little_memory_for_the_real_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (230 << 20, 230 << 20))\n"
    (tmp_path / "sitecustomize.py").write_text(limit)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ZtunError) as caught:
        load_now(layout.find_sources(), PROGRAMS, MAPS)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_child_is_left")
def test_a_compiler_that_hangs_is_ended(spoil_bcc: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_bcc("import time; time.sleep(60)")
    monkeypatch.setattr(loader, "DEADLINE", 0.5)
    with pytest.raises(ZtunError, match=r"BPF programs not loaded: not compiled within 0\.5 s"):
        load_now(layout.find_sources(), PROGRAMS, MAPS)


def test_descriptors_that_do_not_fit_are_given_back() -> None:
    fillers = []
    while not fillers or fillers[-1] < max(open_files()):  # so that no number below the limit is free
        fillers.append(os.dup(0))
    before = open_files()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 10, limits[1]))
    try:
        with pytest.raises(ZtunError, match="too few file descriptors are left"):
            load_now(layout.find_sources(), PROGRAMS, MAPS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert open_files() == before
    for fd in fillers:
        os.close(fd)


def test_maps_of_another_layout_are_refused() -> None:
    before = open_files()
    with pytest.raises(ZtunError, match=r"BPF map clients has keys and values of \(16, 12\) bytes, not \(4, 4\)"):
        load_now(layout.find_sources(), [], {"clients": (4, 4, "lru_hash")})
    assert open_files() == before


def test_python_and_c_agree_on_every_number(bench: Bench) -> None:
    shared = layout.read_shared(layout.find_sources())
    assert shared.enums["verdict"] == [f"VERDICT_{verdict.name}" for verdict in ports.Verdict]
    for name in ("RULE_DEFAULT", "RULE_BUILTIN", "RULE_DNS"):
        assert shared.constants[name] == getattr(ports, name)
    lowest = min(ports.RULE_DEFAULT, ports.RULE_BUILTIN, ports.RULE_FAKE_IP, ports.RULE_DNS)
    assert shared.constants["RULE_OFFSET"] == -lowest


def test_counters_of_verdicts_drops_and_passes_do_not_overlap() -> None:
    shared = layout.read_shared(layout.find_sources())
    enums = [shared.enums[name] for name in ("verdict", "drop_reason", "pass_reason", "xdp_reason", "host_verdict")]
    names = shared.counter_names()
    assert len(names) == sum(len(enum) for enum in enums)
    assert max(names) < shared.constants["COUNTERS"]


def test_auto_takes_tcx_here(world: World) -> None:
    with world.running("auto") as (_, classifier):
        assert (classifier.backend, classifier.fallback_reason) == ("tcx", None)


def test_auto_takes_clsact_on_a_kernel_without_tcx(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_tcx", lambda program: False)
    with world.running("auto") as (_, classifier):
        assert classifier.backend == "clsact"
        assert classifier.fallback_reason == "this kernel has no TCX (Linux 6.6)"
    device = open_device("ztun0", 1500)
    with pytest.raises(ZtunError, match="no TCX"):
        make_classifier("tcx", "ztun0", [], mark=1, hijack_dns=False, fail="open", own_addresses=[])
    device.close()


def test_auto_takes_clsact_where_capture_must_outlive_the_process(world: World) -> None:
    with world.running("auto", fail="closed") as (_, classifier):
        assert classifier.backend == "clsact"
        assert "outlive" in str(classifier.fallback_reason)


def test_auto_takes_routes_without_bcc_and_says_why(world: World, spoil_bcc: Spoil) -> None:
    spoil_bcc("raise ModuleNotFoundError('no bcc')")
    with world.running("auto") as (_, classifier):
        assert classifier.backend == "routes"
        assert "install python3-bpfcc" in str(classifier.fallback_reason)


def test_auto_takes_routes_when_the_verifier_refuses(
    world: World, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that reads beyond the packet, as one might be for an older verifier."""
    text = (sources / "classify.c").read_text()
    spoilt = text.replace("int reply(struct __sk_buff *skb)\n{", "int reply(struct __sk_buff *skb)\n{\n\t" + BEYOND)
    assert spoilt != text
    (sources / "classify.c").write_text(spoilt)
    monkeypatch.setattr(backends.layout, "find_sources", lambda: sources)
    with world.running("auto") as (_, classifier):
        assert classifier.backend == "routes"
        assert "BPF programs not loaded: " in str(classifier.fallback_reason)
        assert "outside of the packet" in str(classifier.fallback_reason)


def test_auto_takes_routes_where_nothing_can_be_attached(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(backends, "TcxHook", refuse)
    monkeypatch.setattr(backends, "ClsactHook", refuse)
    with world.running("auto") as (_, classifier):
        assert classifier.backend == "routes"
        assert classifier.fallback_reason == (
            "this kernel takes no BPF program on tcx: Operation not permitted; "
            "this kernel takes no BPF program on clsact: Operation not permitted"
        )


def test_auto_takes_routes_when_the_compiler_crashes(world: World, spoil_bcc: Spoil) -> None:
    spoil_bcc("import os; os.abort()")
    with world.running("auto") as (_, classifier):
        assert classifier.backend == "routes"
        assert "signal 6 (Aborted)" in str(classifier.fallback_reason)


def test_bpf_asked_for_and_not_to_be_had_is_an_error(spoil_bcc: Spoil) -> None:
    spoil_bcc("raise ModuleNotFoundError('no bcc')")
    with pytest.raises(ZtunError, match="install python3-bpfcc"):
        asyncio.run(backends.choose("bpf", CAPTURE))


def test_an_unknown_backend_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"capture\.backend: 'xdp' is none of auto, bpf, tcx, clsact, routes"):
        asyncio.run(backends.choose("xdp", CAPTURE))


def test_more_prefixes_than_fit_are_refused_in_one_line() -> None:
    # BPF_MAP_CREATE: type LPM_TRIE, key and value size, four entries, BPF_F_NO_PREALLOC
    small = bpfcall.bpf(0, bpfcall.attributes("=IIIII", 11, 8, layout.DECISION.size, 4, 1))
    prefixes = [ports.Prefix(bytes([n, 0, 0, 0]), 8, ports.Verdict.DIRECT, 0) for n in range(5)]
    with pytest.raises(ZtunError, match="5 prefixes are more than the kernel table takes: use fewer"):
        PrefixTable(Map(small, 8, layout.DECISION.size)).replace(prefixes)
    os.close(small)
