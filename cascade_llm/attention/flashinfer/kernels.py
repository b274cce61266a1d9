"""FlashInfer's kernels as files: which ones a model needs, compiling them ahead of time, finding them again.

FlashInfer compiles a module when it is first used, which takes minutes and needs nvcc on the machine that serves.
Compiled ahead, on any machine with nvcc and no GPU, the modules are plain shared libraries: they depend on the CUDA
major version, and on neither torch's nor Python's.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.levels import serving_kernels
from cascade_llm.attention.flashinfer.ops import (
    TESTED_VERSIONS,
    JitModule,
    jit_modules,
    load_flashinfer_ops,
    package_reasons,
    shape_reasons,
)
from cascade_llm.attention.flashinfer.variants import kernel_variants
from cascade_llm.device.cuda_toolkit import build_environment, find_nvcc, toolkit_reasons
from cascade_llm.device.user_cache import cache_folder
from cascade_llm.errors import BackendError

__all__ = [
    "BuiltKernel",
    "KernelState",
    "build_kernels",
    "device_arch",
    "kernel_folder",
    "kernel_states",
    "list_kernels",
    "module_purposes",
    "reasons_against_flashinfer",
]

MIN_CAPABILITY = (8, 0)
MANIFEST = "kernels.json"
JIT_CACHE = "flashinfer_jit_cache"
"""The package of prebuilt kernels, which FlashInfer asks too."""
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "e4m3"}
COMMON_MODULES = {
    "cascade": "merging levels",
    "page": "appending to pages",
    "rope": "rotary embedding",
    "norm": "norms",
    "silu_and_mul": "gated activation",
}
"""Modules that every model needs, whatever its shape."""


log = logging.getLogger("cascade_llm")


@dataclass(frozen=True)
class BuiltKernel:
    """One module and what became of it."""

    name: str
    purpose: str
    seconds: float = 0.0
    num_bytes: int = 0
    error: str | None = None
    """The end of the compiler's output where it failed."""


@dataclass(frozen=True)
class KernelState:
    """A module that a model needs, and where it is."""

    name: str
    purpose: str
    state: Literal["built", "prebuilt", "missing"]
    """built by `cascade-llm kernels build`, in the package flashinfer-jit-cache, or nowhere"""


OnKernel = Callable[[str, int, int], None]
"""Told the module that is compiled now, how many are done, and of how many."""


def reasons_against_flashinfer(spec: AttentionSpec) -> list[str]:
    """Everything that speaks against FlashInfer for this model on this device; nothing where it can serve."""
    reasons = [*_device_reasons(spec.device), *package_reasons(), *shape_reasons(spec)]
    return reasons or _kernel_reasons(spec) or _import_reasons(spec.device)


def kernel_folder(arch: str) -> Path:
    """Where kernels for an architecture ("9.0a") are kept: below CASCADE_LLM_CACHE or the user's cache folder."""
    return cache_folder() / "flashinfer" / TESTED_VERSIONS[0] / arch


def device_arch(device: torch.device) -> str:
    """A CUDA device's architecture in FlashInfer's spelling; from 9.0 on with the architecture's own features."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}a" if major >= 9 else f"{major}.{minor}"


def list_kernels(folder: Path) -> list[BuiltKernel]:
    """What was built into a folder."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return []
    return [BuiltKernel(**entry) for entry in json.loads(manifest.read_text())]


def kernel_states(spec: AttentionSpec, arch: str) -> list[KernelState]:
    """The modules that a model needs on an architecture, and which are there; nothing where no kernel serves its dtype.

    FlashInfer looks into our folder first, then into those of the package flashinfer-jit-cache.
    """
    if spec.dtype not in DTYPE_NAMES:
        return []
    own, prebuilt = kernel_folder(arch), _prebuilt_modules(arch)

    def state_of(name: str) -> Literal["built", "prebuilt", "missing"]:
        if _module_file(own, name).exists():
            return "built"
        return "prebuilt" if name in prebuilt else "missing"

    purposes = module_purposes(spec, serving_kernels(spec))
    return [KernelState(name, purpose, state_of(name)) for name, purpose in purposes.items()]


def module_purposes(spec: AttentionSpec, kernels: Iterable[str]) -> dict[str, str]:
    """The modules that an engine loads, by FlashInfer's names, and what each is for.

    Derived without importing FlashInfer, which asks for the GPU: see the `get_*_uri` functions of 0.7.2, with no
    position encoding.

    Args:
        spec: the model; its dtypes are keys of `DTYPE_NAMES`
        kernels: those that serve, see `serving_kernels`
    """
    dtype, kv_dtype, head_dim = DTYPE_NAMES[spec.dtype], DTYPE_NAMES[spec.page_dtype], spec.head_dim
    types = f"dtype_q_{dtype}_dtype_kv_{kv_dtype}_dtype_o_{dtype}_dtype_idx_i32"
    heads = f"head_dim_qk_{head_dim}_head_dim_vo_{head_dim}"
    purposes: dict[str, list[str]] = {}
    for needed in kernel_variants(spec, kernels):
        variant = f"posenc_0_use_swa_{needed.for_windows}_use_logits_cap_{spec.logits_soft_cap is not None}"
        name = f"batch_prefill_with_kv_cache_{types}_{heads}_{variant}_f16qk_False_kv_stride_equal"
        if needed.kernel == "decode_cuda_cores":
            name = f"batch_decode_with_kv_cache_{types}_{heads}_{variant}"
        purposes.setdefault(name, []).append(needed.purpose)
    return {**{name: ", ".join(served) for name, served in purposes.items()}, **COMMON_MODULES}


def _prebuilt_modules(arch: str) -> set[str]:
    """The modules that the package flashinfer-jit-cache has for an architecture; none without it.

    It names its providers, one or more packages, as FlashInfer's own look-up asks for them (jit/env.py of 0.7.2).
    """
    if importlib.util.find_spec(JIT_CACHE) is None:
        return set()
    try:
        providers = importlib.import_module(JIT_CACHE).get_jit_cache_providers()
    except Exception as error:  # of another version: FlashInfer then does without it too
        log.warning("the package %s cannot be asked for its kernels: %s", JIT_CACHE, error)
        return set()
    return {
        name
        for provider in providers
        if any(_runs_on(target, arch) for target in provider.cuda_architectures)
        for name in provider.modules
        if _module_file(Path(provider.jit_cache_dir), name).exists()
    }


def _runs_on(target: str, arch: str) -> bool:
    """Whether code for "sm90a" or "sm80" runs on "9.0a": the same, or an earlier minor without features of its own."""
    major, minor = arch.split(".")
    if target == f"sm{major}{minor}":
        return True
    own_minor = target.removeprefix(f"sm{major}")
    return own_minor != target and own_minor.isdigit() and int(own_minor) <= int(minor.rstrip("af"))


def _module_file(folder: Path, name: str) -> Path:
    return folder / name / f"{name}.so"


def build_kernels(
    spec: AttentionSpec,
    arch: str,
    folder: Path,
    on_kernel: OnKernel | None = None,
) -> list[BuiltKernel]:
    """Compile what a model needs and is not in the folder yet. No GPU is needed; run it in a process of its own.

    Args:
        spec: the model; its device does not matter
        arch: "9.0a" for Hopper
        folder: takes `<module>/<module>.so` and a list of them
        on_kernel: told of the progress

    Raises:
        BackendError: no compiler, no FlashInfer, or a model that it has no kernels for
    """
    reasons = [*package_reasons(), *shape_reasons(spec), *toolkit_reasons()]
    if reasons:
        raise BackendError(f"kernels cannot be built: {'; '.join(reasons)}")
    built = {kernel.name: kernel for kernel in list_kernels(folder) if kernel.error is None}
    with build_environment(arch):
        modules = jit_modules(spec, serving_kernels(spec))
        for done, module in enumerate(modules):
            if on_kernel is not None:
                on_kernel(module.purpose, done, len(modules))
            if module.name not in built or not _module_file(folder, module.name).exists():
                built[module.name] = _build(module, folder)
                (folder / MANIFEST).write_text(json.dumps([asdict(kernel) for kernel in built.values()], indent=1))
    return [built[module.name] for module in modules]


def _build(module: JitModule, folder: Path) -> BuiltKernel:
    started = time.perf_counter()
    target = _module_file(folder, module.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        module.build()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        target.parent.rmdir()
        return BuiltKernel(module.name, module.purpose, time.perf_counter() - started, error=str(error)[-2000:])
    shutil.copyfile(module.library, target)
    return BuiltKernel(module.name, module.purpose, time.perf_counter() - started, target.stat().st_size)


def _kernel_reasons(spec: AttentionSpec) -> list[str]:
    """Kernels that are neither there nor can be compiled."""
    missing = [state for state in kernel_states(spec, device_arch(spec.device)) if state.state == "missing"]
    if importlib.util.find_spec("cutlass") is not None:  # FlashInfer then compiles its norms without nvcc
        missing = [state for state in missing if state.name != "norm"]
    if not missing or find_nvcc() is not None:
        return []
    purposes = "; ".join(state.purpose for state in missing)
    return [f"its kernels are not built ({purposes}) and there is no nvcc to build them (cascade-llm kernels build)"]


def _import_reasons(device: torch.device) -> list[str]:
    """Why the installed package cannot be imported: a part of it, or of CUDA, may be missing."""
    folder = kernel_folder(device_arch(device))
    try:
        load_flashinfer_ops(folder if folder.exists() else None)
    except BackendError as error:
        return [str(error)]
    return []


def _device_reasons(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [f"needs a CUDA GPU, the device is {device.type}"]
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return [f"needs compute capability 8.0 or newer, the GPU has {capability[0]}.{capability[1]}"]
    return []
