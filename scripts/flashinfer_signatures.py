"""Record, or compare, the signatures of the FlashInfer calls that the engine makes.

    python scripts/flashinfer_signatures.py --write FILE.json
    python scripts/flashinfer_signatures.py --check FILE.json

Importing FlashInfer needs neither a GPU nor a compiler, so a changed parameter is found on any machine, before a
kernel is. CI runs the check in an environment of its own (`make flashinfer-signatures`).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

WRAPPERS = (
    "flashinfer:BatchDecodeWithPagedKVCacheWrapper",
    "flashinfer:CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "flashinfer:BatchPrefillWithPagedKVCacheWrapper",
    "flashinfer:MultiLevelCascadeAttentionWrapper",
)

ENGINE_CALLS = (
    *(f"{name}.{method}" for name in WRAPPERS for method in ("__init__", "plan", "run", "reset_workspace_buffer")),
    # plan() of the decode wrappers only forwards **kwargs: the keywords it takes are those of _plan_impl
    "flashinfer:BatchDecodeWithPagedKVCacheWrapper._plan_impl",
    "flashinfer:BatchDecodeWithPagedKVCacheWrapper.workspace_size",
    "flashinfer:BatchPrefillWithPagedKVCacheWrapper.workspace_size",
    "flashinfer.decode:fast_decode_plan",
    "flashinfer:merge_state",
    "flashinfer:merge_state_in_place",
    "flashinfer:append_paged_kv_cache",
    "flashinfer:get_batch_indices_positions",
    "flashinfer:get_seq_lens",
    "flashinfer.norm:rmsnorm",
    "flashinfer.norm:fused_add_rmsnorm",
    "flashinfer.norm:gemma_rmsnorm",
    "flashinfer.norm:gemma_fused_add_rmsnorm",
    "flashinfer.activation:silu_and_mul",
    "flashinfer.rope:apply_rope_with_cos_sin_cache_inplace",
    "flashinfer.rope:apply_rope_pos_ids_inplace",
    "flashinfer.sampling:softmax",
    "flashinfer.sampling:sampling_from_probs",
    "flashinfer.sampling:sampling_from_logits",
    "flashinfer.sampling:min_p_sampling_from_probs",
    "flashinfer.sampling:top_k_top_p_sampling_from_probs",
    "flashinfer.sampling:top_k_renorm_probs",
    "flashinfer.sampling:top_p_renorm_probs",
    "flashinfer.sampling:top_k_mask_logits",
)
"""`module:attribute` of every call; what the engine begins to call is added here first."""

Parameters = list[dict[str, str]]


def describe(call: Callable[..., Any]) -> Parameters:
    """The parameters of a call, in order: name, kind, and the default as its repr where there is one.

    Annotations are left out: their spelling changes between Python versions.
    """
    described = []
    for parameter in inspect.signature(call).parameters.values():
        entry = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not parameter.empty:
            entry["default"] = repr(parameter.default)
        described.append(entry)
    return described


def take_snapshot() -> dict[str, Any]:
    """The installed FlashInfer's version, and its signatures by the names of `ENGINE_CALLS`; None where one is gone."""
    # unset, the import asks for the GPU's architecture
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    calls: dict[str, Parameters | None] = {}
    for name in ENGINE_CALLS:
        module, attribute = name.split(":")
        try:
            calls[name] = describe(attrgetter(attribute)(importlib.import_module(module)))
        except AttributeError:
            calls[name] = None
    return {"flashinfer": importlib.import_module("flashinfer").__version__, "calls": calls}


def to_json(snapshot: dict[str, Any]) -> str:
    """A snapshot as JSON with one parameter per line, so that a change is one line of a diff."""
    blocks = []
    for name, parameters in snapshot["calls"].items():
        lines = ",\n".join(f"   {json.dumps(entry)}" for entry in parameters)
        blocks.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    calls = ",\n".join(blocks)
    return f'{{\n "flashinfer": {json.dumps(snapshot["flashinfer"])},\n "calls": {{\n{calls}\n }}\n}}\n'


def render(parameters: Parameters | None) -> str:
    """A signature as one would write it, for messages."""
    if parameters is None:
        return "not there"
    parts: list[str] = []
    star_seen = False
    for entry in parameters:
        star = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(entry["kind"], "")
        if entry["kind"] == "KEYWORD_ONLY" and not star_seen:
            parts.append("*")
        star_seen = star_seen or entry["kind"] in ("KEYWORD_ONLY", "VAR_POSITIONAL")
        parts.append(star + entry["name"] + (f"={entry['default']}" if "default" in entry else ""))
    return f"({', '.join(parts)})"


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One line per difference of two snapshots; none where they are equal."""
    lines = []
    if expected["flashinfer"] != found["flashinfer"]:
        lines.append(f"version: expected {expected['flashinfer']}, found {found['flashinfer']}")
    for name in sorted(expected["calls"].keys() | found["calls"].keys()):
        before, now = expected["calls"].get(name), found["calls"].get(name)
        if before != now or (name in expected["calls"]) != (name in found["calls"]):
            lines.append(f"{name}\n    expected {render(before)}\n    found    {render(now)}")
    return lines


def main() -> int:
    """Run the command line; 1 where the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="record the installed FlashInfer's signatures")
    action.add_argument("--check", type=Path, metavar="FILE", help="compare them with a recorded file")
    arguments = parser.parse_args()
    found = take_snapshot()
    missing = [name for name, parameters in found["calls"].items() if parameters is None]
    if arguments.write:
        if missing:
            print(f"FlashInfer {found['flashinfer']} has no {', '.join(missing)}", file=sys.stderr)
            return 1
        arguments.write.write_text(to_json(found))
        return 0
    lines = differences(json.loads(arguments.check.read_text()), found)
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        print(f"\nwhere the engine still fits, record them: {Path(__file__).name} --write FILE", file=sys.stderr)
        return 1
    print(f"FlashInfer {found['flashinfer']}: {len(found['calls'])} signatures as recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
