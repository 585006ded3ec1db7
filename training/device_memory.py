"""The peak memory of one phase of a program: what a device's allocator or the process held at most.

    peak = PeakMemory(torch.device("cuda"))     # counting starts here
    train()
    peak.read()                                 # bytes, or None where it cannot be measured

On CUDA it is the most that PyTorch's allocator had handed out at once. On the CPU it is the peak resident
set of the process, interpreter and data included, which Linux can count afresh from any moment; the
process's lifetime peak, all that other systems offer, would charge one model with another's memory.
"""

import ctypes
import gc
import re
from pathlib import Path

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # see proc(5): resets VmHWM, the "high water mark" of the resident set


class PeakMemory:
    """The peak since construction.

    kind: "cuda allocator" or "resident set"; None where there is no measure, with the reason in `reason`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.kind, self.reason = device, None, ""  # type: torch.device, str | None, str
        gc.collect()
        if device.type == "cuda":
            self.kind = "cuda allocator"
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            try:
                _return_free_memory()
                CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
                _resident_peak()
                self.kind = "resident set"
            except (OSError, ValueError) as error:
                self.reason = f"the peak resident set cannot be reset here: {error}"
        else:
            self.reason = f"no peak memory counter for device type {device.type}"

    def read(self) -> int | None:
        """Bytes, the highest value since construction."""
        if self.kind == "cuda allocator":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_peak() if self.kind == "resident set" else None


def _return_free_memory() -> None:
    """Give what the allocator keeps of earlier phases back to the system (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_peak() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{STATUS} has no VmHWM")
    return int(found[1]) * 1024
