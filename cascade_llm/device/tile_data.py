"""The kernel's permission to use the tile registers of AMX, which a process asks for before its first instruction.

Tiles are 8 KiB of state that a kernel saves for those processes alone that asked. All threads of the process have the
permission, those that exist and those to come, and so has a child of a fork; a new program asks again. See
`Documentation/arch/x86/xstate.rst` of Linux. Standard library only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

__all__ = ["reason_against_tiles"]

SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA = 158, 0x1023, 18


@functools.cache
def reason_against_tiles() -> str | None:
    """Ask for the tile registers of an x86-64 processor that has them, once; why they are refused, or None."""
    if sys.platform != "linux":
        return f"{sys.platform} is not asked for tile registers"
    system = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_long(number) for number in (SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA))
    if system.syscall(*arguments) == 0:
        return None
    return f"the kernel refuses tile registers to this process: {os.strerror(ctypes.get_errno())}"
