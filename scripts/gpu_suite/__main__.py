"""Check and measure the GPU path on a machine with a GPU and without network, in ten minutes.

    python -m scripts.gpu_suite --out RESULTS [--archive flashinfer.tar.xz] [--kernels FOLDER] [--fp8] [--budget-s 580]

`--archive` holds FlashInfer and small packages (a folder of site-packages as .tar.xz); `--kernels` what
`cascade-llm kernels build` compiled; `--fp8` validates kernels over FP8 pages too. Writes RESULTS/results.json after
every stage, and plots at the end. `--dry-run` looks at what is carried and what imports, and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from scripts.gpu_suite.imports import REQUIRED, check_imports
from scripts.gpu_suite.watchdog import start_watchdog

CARRIED_LIMIT_BYTES = 64 << 20
"""What may be carried to the machine, archive and kernels together."""
LAST_WORDS_S = 5.0


def main() -> int:
    """Run the command line; 1 where nothing can be measured, 3 where the time was over before the stages were."""
    started = time.perf_counter()
    arguments = _arguments()
    # before anything is imported: unset, FlashInfer asks the GPU for its architecture
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    carried = sum(_num_bytes(path) for path in (arguments.archive, arguments.kernels) if path)
    print(f"carried: {carried / 2**20:.1f} of {CARRIED_LIMIT_BYTES >> 20} MiB", flush=True)
    if carried > CARRIED_LIMIT_BYTES:
        print("too much to carry: leave packages or kernels out", file=sys.stderr)
        return 1
    if arguments.kernels:
        os.environ["CASCADE_LLM_CACHE"] = str(arguments.kernels.resolve())
    if arguments.archive:
        folder = tempfile.mkdtemp(prefix="cascade_llm_packages_")
        with tarfile.open(arguments.archive) as tar:
            tar.extractall(folder, filter="data")
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))
    missing = check_imports()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps({"imports": missing}, indent=1))
    if any(missing.get(name) for name in REQUIRED):
        print("nothing can be measured without these", file=sys.stderr)
        return 1
    if arguments.dry_run:
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 1
    from scripts.gpu_suite.machine import CudaMachine
    from scripts.gpu_suite.shapes import FULL
    from scripts.gpu_suite.suite import STAGES, Suite

    left = arguments.budget_s - (time.perf_counter() - started)
    suite = Suite(CudaMachine(), arguments.out, FULL, left - LAST_WORDS_S, fp8=arguments.fp8)
    suite.results["imports"] = missing
    suite.save()
    watchdog = start_watchdog(left - LAST_WORDS_S, suite.stop)
    suite.run(arguments.stages.split(",") if arguments.stages else STAGES)
    watchdog.cancel()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--archive", type=Path, help="packages to unpack and use")
    parser.add_argument("--kernels", type=Path, help="a cache folder with compiled kernels (CASCADE_LLM_CACHE)")
    parser.add_argument("--stages", help="comma-separated; default all")
    parser.add_argument("--fp8", action="store_true", help="validate kernels over FP8 pages too")
    parser.add_argument("--dry-run", action="store_true", help="only look at what is carried and what imports")
    parser.add_argument("--budget-s", type=float, default=580.0, help="seconds from start to end")
    return parser.parse_args()


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
