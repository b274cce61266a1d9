"""Check and measure the GPU path on a machine with a GPU, within ten minutes and without network.

    python -m scripts.gpu_suite OUT [--stage NAME ...] [--quick] [--archive packages.tar.xz] [--kernels FOLDER]

Each stage is a process with a time limit of its own and writes OUT/NAME.json; OUT/summary.json says how each ended.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

from scripts.gpu_suite.runner import Runner, Stage, pack
from scripts.gpu_suite.table import STAGES

CARRIED_LIMIT_BYTES = 64 << 20
"""What may be carried to the machine, archive and kernels together."""
DRY_MACHINE = "tests.gpu_path.double_machine:DoubleMachine"


def main() -> int:
    """Run the command line; 1 where a stage failed or too much was carried."""
    arguments = _arguments()
    carried = sum(_num_bytes(path) for path in (arguments.archive, arguments.kernels) if path)
    if carried > CARRIED_LIMIT_BYTES:
        limit_mib = CARRIED_LIMIT_BYTES >> 20
        print(f"{carried / 2**20:.1f} MiB are carried, {limit_mib} may be: leave packages or kernels out")
        return 1
    with tempfile.TemporaryDirectory(prefix="cascade_llm_packages_") as folder:
        _set_environment(arguments, folder)
        options = ["--quick"] if arguments.quick or arguments.dry else []
        options += ["--machine", DRY_MACHINE] if arguments.dry else []
        stages = _chosen(arguments.stage)
        if arguments.dry:  # limits are for a GPU, on a machine of its own
            stages = [replace(stage, limit_s=arguments.budget_s) for stage in stages]
        summary = Runner(arguments.out, arguments.budget_s, options).run(stages)
    pack(arguments.out)
    return int(any(entry["verdict"] == "failed" for entry in summary["stages"].values()))


def _set_environment(arguments: argparse.Namespace, folder: str) -> None:
    """What all stages inherit."""
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")  # unset, FlashInfer asks the GPU when it is imported
    if arguments.kernels:
        os.environ["CASCADE_LLM_CACHE"] = str(arguments.kernels.resolve())
    if arguments.archive:
        with tarfile.open(arguments.archive) as tar:
            tar.extractall(folder, filter="data")
        os.environ["PYTHONPATH"] = os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))


def _chosen(names: list[str]) -> list[Stage]:
    """The stages that were named; without names all that are not optional."""
    if names:
        return [stage for stage in STAGES if stage.name in {*names, "machine"}]
    return [stage for stage in STAGES if not stage.optional]


def _arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {stage.name:12}{stage.about}{' (optional)' * stage.optional}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_suite",
        description=__doc__,
        epilog=f"stages:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="a folder for the results")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", action="append", default=[], choices=names, metavar="NAME", help="only these")
    parser.add_argument("--quick", action="store_true", help="small sizes: a first look in about three minutes")
    parser.add_argument("--dry", action="store_true", help="on doubles, quick sizes; the budget alone is a limit")
    parser.add_argument("--archive", type=Path, help="packages to unpack and use, site-packages as .tar.xz")
    parser.add_argument("--kernels", type=Path, help="a cache folder with compiled kernels (CASCADE_LLM_CACHE)")
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for all stages (default 570)")
    return parser.parse_args()


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
