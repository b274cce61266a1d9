"""What pyproject.toml cannot say: a wheel carries the native code, compiled for each level of processor.

Where no compiler is found, the wheel is of Python alone and says so.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from sysconfig import get_platform

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # a build's own environment holds no package

from cascade_llm.device.cpu_levels import LEVELS
from cascade_llm.device.native_build import build_libraries, compiler_architecture, compiler_command, needed_glibc

LIBRARIES = Path("cascade_llm", "device", "libraries")
"""Below the folder of a build."""


def platform_architecture(tag: str) -> str | None:
    """The architecture, as `LEVELS` has it, of a platform tag such as linux_x86_64."""
    words = tag.replace("-", "_").lower()
    return next((name for name in LEVELS if words.endswith((name, {"aarch64": "arm64"}.get(name, name)))), None)


def default_platform() -> str:
    """This machine's platform tag, or Linux on the machine that the compiler of CC builds for."""
    compiler, own = compiler_command(), get_platform()
    target = None if compiler is None else compiler_architecture(compiler)
    return own if target in (None, platform_architecture(own)) else f"linux-{target}"


def has_native_code(platform_tag: str) -> bool:
    """Whether this build can make native code for a platform."""
    return compiler_command() is not None and platform_architecture(platform_tag) is not None


class NativeDistribution(Distribution):
    """A package whose files go where compiled ones go, if a compiler is there."""

    def has_ext_modules(self) -> bool:
        """See setuptools."""
        return has_native_code(self.get_command_obj("bdist_wheel").plat_name or default_platform())


class Wheel(bdist_wheel):
    """For one platform and any Python 3: the native code does not use Python."""

    def finalize_options(self) -> None:
        """See setuptools."""
        self.is_platform_asked = self.plat_name is not None
        if not self.is_platform_asked and default_platform() != get_platform():
            self.plat_name = default_platform()
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """See setuptools; Linux is named with the glibc that the libraries need, unless the caller names a platform."""
        tag: tuple[str, str, str] = super().get_tag()
        if self.root_is_pure:
            return tag
        system, _, machine = tag[2].partition("_")
        folder = Path(self.get_finalized_command("build").build_lib) / LIBRARIES
        glibc = needed_glibc(folder.glob("*.so")) if system == "linux" and not self.is_platform_asked else None
        return ("py3", "none", tag[2] if glibc is None else f"manylinux_2_{glibc}_{machine}")


class Build(build_py):
    """Python files, and the libraries beside them; an editable install compiles at first use, as a checkout does."""

    def run(self) -> None:
        """See setuptools."""
        super().run()
        if self.editable_mode:
            return
        wheel = self.get_finalized_command("bdist_wheel")
        compiler, architecture = compiler_command(), platform_architecture(wheel.plat_name)
        if compiler is None or architecture is None:
            self.warn(f"no native code in this build: no C compiler, or nothing for {wheel.plat_name}")
            return
        folder = Path(self.build_lib) / LIBRARIES
        shutil.rmtree(folder, ignore_errors=True)  # of a build for another platform, in the same folder
        build_libraries(compiler, architecture, folder)


setup(distclass=NativeDistribution, cmdclass={"bdist_wheel": Wheel, "build_py": Build})
