"""What pyproject.toml cannot say: a wheel carries the native code, compiled for each level of processor.

Where no compiler is found, the wheel is of Python alone and says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from sysconfig import get_platform

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # a build's own environment holds no package

from cascade_llm.device.cpu_levels import LEVELS
from cascade_llm.device.native_build import build_libraries, compiler_command


def platform_architecture(tag: str) -> str | None:
    """The architecture, as `LEVELS` has it, of a platform tag such as linux_x86_64."""
    words = tag.replace("-", "_").lower()
    return next((name for name in LEVELS if words.endswith((name, {"aarch64": "arm64"}.get(name, name)))), None)


def has_native_code(platform_tag: str) -> bool:
    """Whether this build can make native code for a platform."""
    return compiler_command() is not None and platform_architecture(platform_tag) is not None


class NativeDistribution(Distribution):
    """A package whose files go where compiled ones go, if a compiler is there."""

    def has_ext_modules(self) -> bool:
        """See setuptools."""
        return has_native_code(self.get_command_obj("bdist_wheel").plat_name or get_platform())


class Wheel(bdist_wheel):
    """For one platform and any Python 3: the native code does not use Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """See setuptools."""
        tag: tuple[str, str, str] = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


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
        build_libraries(compiler, architecture, Path(self.build_lib) / "cascade_llm" / "device" / "libraries")


setup(distclass=NativeDistribution, cmdclass={"bdist_wheel": Wheel, "build_py": Build})
