"""On which machine a figure was measured."""

import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def this_machine() -> dict[str, str | int | float]:
    """Return CPU model, cores that this process may use, memory and system."""
    model = platform.processor() or platform.machine()
    if _CPUINFO.exists():  # Linux alone tells more than the architecture.
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
                break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container may use fewer cores than the machine has; only Linux tells.
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": model,
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": platform.platform(),
    }
