from __future__ import annotations

import pytest

from cascade_llm.device import cpu_levels
from cascade_llm.device.cpu_levels import LEVEL_VARIABLE, LEVELS, levels_to_try
from cascade_llm.errors import ConfigError

V3 = "pni ssse3 sse4_1 sse4_2 popcnt cx16 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
BF16 = f"{V4} avx512_vnni avx512_bf16"
AMX = f"{BF16} amx_tile amx_int8 amx_bf16"


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As another machine's; `flags` of it by `has`."""
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(cpu_levels, "architecture", lambda: "x86_64")
    monkeypatch.setattr(cpu_levels, "reason_against_tiles", lambda: None)
    return monkeypatch


def has(processor: pytest.MonkeyPatch, flags: str) -> list[str]:
    processor.setattr(cpu_levels, "processor_flags", lambda: frozenset(flags.split()))
    return [level.name for level in levels_to_try()]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", []),
        ("pni ssse3 sse4_1 sse4_2 popcnt cx16 avx", ["baseline"]),
        (V3, ["avx2", "baseline"]),
        (f"{V3} avx_vnni", ["avxvnni", "avx2", "baseline"]),
        (V4, ["avx2", "baseline"]),
        (f"{V4} avx512_vnni", ["avx512", "avx2", "baseline"]),
        (BF16, ["avx512bf16", "avx512", "avx2", "baseline"]),
        (AMX, ["amx", "avx512bf16", "avx512", "avx2", "baseline"]),
        (f"{BF16} amx_tile amx_int8", ["avx512bf16", "avx512", "avx2", "baseline"]),
        (f"{V4} avx_vnni avx512_bf16", ["avxvnni", "avx2", "baseline"]),
    ],
)
def test_levels_that_a_processor_has(flags: str, expected: list[str], processor: pytest.MonkeyPatch) -> None:
    assert has(processor, flags) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fp asimd crc32 cpuid", ["baseline"]),  # Cortex-A72
        ("fp asimd atomics asimdhp asimddp", ["dotprod", "baseline"]),  # Neoverse N1
        ("asimd asimdhp asimddp sve bf16 i8mm", ["i8mm", "dotprod", "baseline"]),  # Neoverse V1
        ("asimd asimdhp asimddp i8mm", ["dotprod", "baseline"]),
        ("asimd asimdhp sve", ["baseline"]),  # A64FX
    ],
)
def test_levels_that_an_arm_processor_has(flags: str, expected: list[str], processor: pytest.MonkeyPatch) -> None:
    processor.setattr(cpu_levels, "architecture", lambda: "aarch64")
    assert has(processor, flags) == expected


def test_a_process_can_be_held_to_a_lower_level(processor: pytest.MonkeyPatch) -> None:
    processor.setenv(LEVEL_VARIABLE, "avx2")
    assert has(processor, f"{V4} avx_vnni avx512_vnni") == ["avx2", "baseline"]


@pytest.mark.parametrize(("asked", "words"), [("sse9", "one of baseline, avx2"), ("avx512", "lacks avx512_vnni")])
def test_a_level_that_is_not_there_is_told(asked: str, words: str, processor: pytest.MonkeyPatch) -> None:
    processor.setenv(LEVEL_VARIABLE, asked)
    with pytest.raises(ConfigError, match=f"{LEVEL_VARIABLE} is '{asked}'.*{words}"):
        has(processor, V4)


def test_a_kernel_that_refuses_tiles_leaves_the_level_below(processor: pytest.MonkeyPatch) -> None:
    processor.setattr(cpu_levels, "reason_against_tiles", lambda: "the kernel refuses")
    assert has(processor, AMX)[0] == "avx512bf16"
    processor.setenv(LEVEL_VARIABLE, "amx")
    with pytest.raises(ConfigError, match=f"{LEVEL_VARIABLE} is 'amx', but the kernel refuses"):
        levels_to_try()


def test_tiles_are_not_asked_for_below_their_level(processor: pytest.MonkeyPatch) -> None:
    processor.setattr(cpu_levels, "reason_against_tiles", lambda: pytest.fail("asked"))
    assert has(processor, BF16)[0] == "avx512bf16"
    processor.setenv(LEVEL_VARIABLE, "avx512")
    assert has(processor, AMX)[0] == "avx512"


def test_names_are_unique_in_an_architecture() -> None:
    for levels in LEVELS.values():
        assert len({level.name for level in levels}) == len(levels)
