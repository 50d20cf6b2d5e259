"""Throw-away guests with another kernel over this machine's file system.

Emulation is enough. Knows nothing of KSM and of what is run in a guest.
"""

from __future__ import annotations

from ksmtrace.vm.kernels import Kernel, find_kernel
from ksmtrace.vm.machine import VmOptions
from ksmtrace.vm.run import Outcome, VmResult, run_in_vm

__all__ = ["Kernel", "Outcome", "VmOptions", "VmResult", "find_kernel", "run_in_vm"]
