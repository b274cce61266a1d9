"""The native code that there is: each C file with each set of macros that it is built with.

Standard library only: the build of the wheel reads this too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade_llm.device.cpu_levels import CpuLevel

__all__ = [
    "BLOCKED",
    "EXCHANGE",
    "PACKED_FLOATS",
    "PACKED_FRACTIONS",
    "PACKED_INTEGERS",
    "PACKED_LAYOUT",
    "PACKED_PRODUCT",
    "PARALLEL",
    "REPLAY",
    "SAMPLER",
    "SUPER_BLOCKS",
    "NativeUnit",
    "attention_unit",
    "ops_unit",
    "packed_tiles_unit",
    "routing_unit",
    "row_major_unit",
    "units_of_wheel",
]

PACKAGE = Path(__file__).parent.parent
ELEMENTS = ("float32", "bfloat16")
OTHER_PAGES = ("bfloat16", "float16", "float8", "int8")
WHEEL_HEAD_DIMS: Mapping[int, tuple[str, ...]] = {64: OTHER_PAGES, 80: (), 96: (), 128: OTHER_PAGES, 256: ()}
"""Of the attention kernels in the wheel, and with which pages beside those of the element's own type; others are
compiled when a model asks."""

PACKED_INTEGERS = ("u2", "u3", "u4", "u5", "u6", "u8", "table", "halved_table")
PACKED_FRACTIONS = ("fractions",)
PACKED_FLOATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32")
"""Of packed matrices: `enum code` of packed.h, in this order; products of the last two are exact."""


@dataclass(frozen=True)
class NativeUnit:
    """One C file with its macros.

    Attributes:
        source: below the package's folder
        functions: what it exports, as the C file calls it
        macros: as "NAME" or "NAME=value"
        suffix: of the functions' names in a library, so that units of one file can lie in one
        flag: what the processor must have; None: any processor will do
    """

    source: str
    functions: tuple[str, ...]
    macros: tuple[str, ...] = ()
    suffix: str = ""
    flag: str | None = None

    @property
    def path(self) -> Path:
        """The C file."""
        return PACKAGE / self.source

    @property
    def exported(self) -> tuple[str, ...]:
        """The functions' names in a library."""
        return tuple(name + self.suffix for name in self.functions)

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        renamed = zip(self.functions, self.exported, strict=True) if self.suffix else ()
        return tuple(f"-D{macro}" for macro in (*self.macros, *(f"{name}={full}" for name, full in renamed)))

    def fits(self, level: CpuLevel) -> bool:
        """Whether it can be built for a level."""
        return self.flag is None or self.flag in level.flags


PARALLEL = NativeUnit("device/parallel.c", ("cascade_parallel_for",))
REPLAY = NativeUnit("device/replay.c", ("replay_calls",))
EXCHANGE = NativeUnit("device/exchange.c", ("rank_tell", "rank_wait"))
SAMPLER = NativeUnit("sampling/native_sampler.c", ("scratch_len", "sample_rows", "draw_rows"))
PACKED_LAYOUT = NativeUnit("weights/packed_layout.c", ("packed_tile_bytes", "pack_tiles", "packed_rows"))
PACKED_PRODUCT = NativeUnit("weights/packed_product.c", ("packed_product", "packed_stack_product"))
SUPER_BLOCKS = NativeUnit("weights/super_blocks.c", ("round_super_blocks",))
BLOCKED = NativeUnit("weights/blocked.c", ("blocked_product",), flag="avx512_bf16")


def attention_unit(element: str, pages: str, head_dim: int) -> NativeUnit:
    """The attention kernels for one element type, "float32" or "bfloat16", one of pages and one head size."""
    return NativeUnit(
        "attention/native_attention.c",
        ("plan_tasks", "attend", "write_slots"),
        (element.upper(), f"PAGES_{pages.upper()}", f"HEAD_DIM={head_dim}"),
        f"_{element}_{pages}_{head_dim}",
    )


def routing_unit(element: str) -> NativeUnit:
    """The two ends of a block of experts, for one element type."""
    return NativeUnit("layers/native_routing.c", ("route_rows", "combine_rows"), (element.upper(),), f"_{element}")


def packed_tiles_unit(code: str, is_exact: bool) -> NativeUnit:
    """Products of packed tiles, for one code; those of fractions and of floats are exact."""
    exact = code in PACKED_FRACTIONS or (is_exact and code in PACKED_INTEGERS)
    macros = (f"CODE={code.upper()}", *(("EXACT",) if exact else ()))
    return NativeUnit("weights/packed_tiles.c", ("packed_tiles",), macros, f"_{code}{'_exact' if exact else ''}")


def row_major_unit(element: str) -> NativeUnit:
    """Products with rows of weights as they lie, for one element type of inputs."""
    return NativeUnit("weights/row_major.c", ("row_major_product",), (element.upper(),), f"_{element}")


def ops_unit(element: str) -> NativeUnit:
    """The elementwise operations for one element type."""
    functions = ("add_rms_norm", "rotate", "silu_and_mul", "gelu_tanh_and_mul", "clamped_swiglu")
    return NativeUnit("layers/native_ops.c", functions, (element.upper(),), f"_{element}")


def units_of_wheel() -> Iterator[NativeUnit]:
    """All that a library of the wheel holds, as far as its level has the instructions."""
    yield from (PARALLEL, REPLAY, EXCHANGE, SAMPLER, PACKED_LAYOUT, PACKED_PRODUCT, SUPER_BLOCKS, BLOCKED)
    yield from (packed_tiles_unit(code, is_exact) for code in PACKED_INTEGERS for is_exact in (False, True))
    yield from (packed_tiles_unit(code, is_exact=True) for code in (*PACKED_FRACTIONS, *PACKED_FLOATS))
    for element in ELEMENTS:
        yield ops_unit(element)
        yield routing_unit(element)
        yield row_major_unit(element)
        for head_dim, others in WHEEL_HEAD_DIMS.items():
            yield from (attention_unit(element, pages, head_dim) for pages in dict.fromkeys((element, *others)))
