"""Compiling, loading, and choosing the backend when something is missing."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
from lan_world import Bench, World

from ztun import ports
from ztun.errors import ConfigError, ZtunError
from ztun.platform.linux import backends, bpf, bpfcall, layout, make_classifier, open_device
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.classifier import MAPS, PROGRAMS
from ztun.platform.linux.maps import Map
from ztun.platform.linux.tables import PrefixTable

CAPTURE = Capture("lo", (), 1, False, False, ())


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of bpf/ to spoil."""
    return Path(shutil.copytree(layout.find_sources(), tmp_path / "bpf"))


def test_a_compile_error_is_one_line_with_its_place(sources: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (sources / "classify.c").write_text("int capture(struct __sk_buff *skb) { return nothing; }\n")
    with pytest.raises(ZtunError) as caught:
        bpf.load(sources, PROGRAMS, ())
    assert "main.c:1:45: error: use of undeclared identifier 'nothing'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_the_verifier_dislikes_is_one_line(sources: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (sources / "classify.c").write_text("int capture(struct __sk_buff *skb) { return *(int *)(long)skb->data; }\n")
    with pytest.raises(ZtunError, match=r"not loaded: .*R1 offset is outside of the packet") as caught:
        bpf.load(sources, ["capture"], ())
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_environment_is_as_before(bench: Bench, monkeypatch: pytest.MonkeyPatch, sources: Path) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/nowhere")
    before = Path.cwd()
    bpf.load(layout.find_sources(), ["reply"], ["clients"]).close()
    assert os.environ["BCC_KERNEL_SOURCE"] == "/nowhere"
    assert Path.cwd() == before


def test_python_and_c_agree_on_every_number(bench: Bench) -> None:
    shared = layout.read_shared(layout.find_sources())
    assert shared.enums["verdict"] == [f"VERDICT_{verdict.name}" for verdict in ports.Verdict]
    for name in ("RULE_DEFAULT", "RULE_BUILTIN", "RULE_DNS"):
        assert shared.constants[name] == getattr(ports, name)
    lowest = min(ports.RULE_DEFAULT, ports.RULE_BUILTIN, ports.RULE_FAKE_IP, ports.RULE_DNS)
    assert shared.constants["RULE_OFFSET"] == -lowest


def test_counters_of_verdicts_drops_and_passes_do_not_overlap() -> None:
    shared = layout.read_shared(layout.find_sources())
    enums = [shared.enums[name] for name in ("verdict", "drop_reason", "pass_reason")]
    names = shared.counter_names()
    assert len(names) == sum(len(enum) for enum in enums)
    assert max(names) < shared.constants["COUNTERS"]


@pytest.mark.parametrize("name", MAPS)
def test_python_and_the_kernel_agree_on_the_size_of_keys_and_values(bench: Bench, name: str) -> None:
    # struct bpf_map_info: type, id, key_size, value_size
    info = ctypes.create_string_buffer(16)
    attr = bpfcall.attributes("=IIQ", bench.objects.maps[name], len(info), ctypes.addressof(info))
    bpfcall.bpf(bpfcall.OBJ_GET_INFO_BY_FD, attr)
    _, _, key_size, value_size = struct.unpack("=IIII", info.raw)
    assert (key_size, value_size) == MAPS[name][:2]


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


def test_auto_takes_routes_without_bcc_and_says_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with world.running("auto") as (_, classifier):
        assert classifier.backend == "routes"
        assert "install python3-bpfcc" in str(classifier.fallback_reason)


def test_bpf_asked_for_and_not_to_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(ZtunError, match="install python3-bpfcc"):
        backends.choose("bpf", CAPTURE)


def test_an_unknown_backend_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"capture\.backend: 'xdp' is none of auto, bpf, tcx, clsact, routes"):
        backends.choose("xdp", CAPTURE)


def test_more_prefixes_than_fit_are_refused_in_one_line() -> None:
    # BPF_MAP_CREATE: type LPM_TRIE, key and value size, four entries, BPF_F_NO_PREALLOC
    small = bpfcall.bpf(0, bpfcall.attributes("=IIIII", 11, 8, layout.DECISION.size, 4, 1))
    prefixes = [ports.Prefix(bytes([n, 0, 0, 0]), 8, ports.Verdict.DIRECT, 0) for n in range(5)]
    with pytest.raises(ZtunError, match="5 prefixes are more than the kernel table takes: use fewer"):
        PrefixTable(Map(small, 8, layout.DECISION.size)).replace(prefixes)
    os.close(small)
