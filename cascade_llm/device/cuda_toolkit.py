"""The CUDA toolkit as FlashInfer's builds need it, on machines that have a part of it and no GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["build_environment", "find_nvcc", "toolkit_reasons"]

HEADER_PACKAGES = {"cublasLt.h": "nvidia-cublas", "curand.h": "nvidia-curand"}
"""Parts that a small toolkit lacks, and the PyPI package (of CUDA 13) that brings each: for norms and sampling."""


def find_nvcc() -> Path | None:
    """The CUDA compiler, as FlashInfer looks for it."""
    homes = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    on_path = shutil.which("nvcc")
    places = [*homes, *([Path(on_path)] if on_path else []), Path("/usr/local/cuda/bin/nvcc")]
    return next((place for place in places if place.exists()), None)


def toolkit_reasons() -> list[str]:
    """What keeps FlashInfer's kernels from being compiled here, each with its cure."""
    nvcc = find_nvcc()
    if nvcc is None:
        return ["no nvcc was found: install the CUDA toolkit 13.0, or set CUDA_HOME"]
    missing = [header for header in HEADER_PACKAGES if not _includes(nvcc, header)]
    if not missing:
        return []
    packages = " ".join(HEADER_PACKAGES[header] for header in missing)
    return [f"{nvcc} finds no {' and no '.join(missing)}: pip install {packages}"]


@contextmanager
def build_environment(arch: str) -> Iterator[None]:
    """What FlashInfer's build needs in the environment: the architecture, and what the toolkit may lack."""
    before = dict(os.environ)
    nvcc = find_nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory(prefix="cascade_llm_") as stubs:
        os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch
        os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))  # ninja's
        if "CUDA_HOME" not in os.environ and (home := _toolkit_of(nvcc)) is not None:
            os.environ["CUDA_HOME"] = str(home)
        if _make_driver_stub(Path(stubs)):
            _append("FLASHINFER_EXTRA_LDFLAGS", f"-L{stubs}")
        for folder in _header_folders():
            _append("FLASHINFER_EXTRA_CUDAFLAGS", f"-I{folder}")
            _append("FLASHINFER_EXTRA_CFLAGS", f"-I{folder}")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _append(name: str, flag: str) -> None:
    os.environ[name] = f"{os.environ.get(name, '')} {flag}".strip()


def _includes(nvcc: Path, header: str) -> bool:
    """Whether the compiler finds a header, by itself or in PyPI packages."""
    folders = [f"-I{folder}" for folder in _header_folders()]
    with tempfile.TemporaryDirectory(prefix="cascade_llm_") as scratch:
        source = Path(scratch) / "header.cu"
        source.write_text(f"#if !__has_include(<{header}>)\n#error missing\n#endif\n")
        command = [str(nvcc), *folders, "-E", str(source)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _toolkit_of(nvcc: Path) -> Path | None:
    """The toolkit's folder; None where nvcc is only a script that calls another."""
    home = nvcc.resolve().parent.parent
    if (home / "include" / "cuda.h").exists():
        return home
    usual = Path("/usr/local/cuda")
    return usual if (usual / "include" / "cuda.h").exists() else None


def _make_driver_stub(folder: Path) -> bool:
    """An empty libcuda.so to link against: the real one comes with the driver, which a machine without GPU lacks."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return False
    command = [compiler, "-shared", "-x", "c", os.devnull, "-o", str(folder / "libcuda.so")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _header_folders() -> list[Path]:
    """Folders of NVIDIA's PyPI packages that hold headers which FlashInfer includes."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    return sorted(
        {found.parent for root in roots for header in HEADER_PACKAGES for found in root.glob(f"**/include/{header}")}
    )
