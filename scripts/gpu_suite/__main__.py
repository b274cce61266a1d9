"""Check and measure the GPU path on a machine with a GPU and without network, in ten minutes.

    python -m scripts.gpu_suite --out RESULTS [--archive flashinfer.tar.xz] [--kernels FOLDER] [--budget-s 600]

`--archive` holds FlashInfer and small packages (a folder of site-packages as .tar.xz); `--kernels` what
`cascade-llm kernels build` compiled. Writes RESULTS/results.json after every stage, and plots at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
from pathlib import Path


def main() -> int:
    """Run the command line; 1 where nothing can be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--archive", type=Path, help="packages to unpack and use")
    parser.add_argument("--kernels", type=Path, help="a cache folder with compiled kernels (CASCADE_LLM_CACHE)")
    parser.add_argument("--stages", help="comma-separated; default all")
    parser.add_argument("--budget-s", type=float, default=600.0)
    arguments = parser.parse_args()
    # before anything is imported: unset, FlashInfer asks the GPU for its architecture
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    if arguments.kernels:
        os.environ["CASCADE_LLM_CACHE"] = str(arguments.kernels.resolve())
    if arguments.archive:
        folder = tempfile.mkdtemp(prefix="cascade_llm_packages_")
        with tarfile.open(arguments.archive) as tar:
            tar.extractall(folder, filter="data")
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))

    from scripts.gpu_suite.suite import STAGES, Suite, check_imports

    missing = check_imports()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 1
    from scripts.gpu_suite.machine import CudaMachine
    from scripts.gpu_suite.shapes import FULL

    suite = Suite(CudaMachine(), arguments.out, FULL, arguments.budget_s)
    suite.results["imports"] = missing
    suite.save()
    suite.run(arguments.stages.split(",") if arguments.stages else STAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
