"""Where a model runs and in which number format: the words of the command line made concrete."""

import os
from pathlib import Path

import torch

from llmasos.errors import UsageError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str) -> str:
    """`auto` becomes `cuda` where there is one and `cpu` elsewhere; other names are checked."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{name!r} is not a device", hint="try --device auto, cpu or cuda:0") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"this machine has no device {name}", hint="try --device auto")
    return str(device)


def resolve_dtype(name: str, device: str) -> str:
    """`auto` becomes float32 on a CPU (the numerics contract) and bfloat16 on a GPU."""
    if name == "auto":
        return "bfloat16" if torch.device(device).type == "cuda" else "float32"
    if name not in DTYPES:
        raise UsageError(f"{name!r} is not a number format served here", hint=f"try --dtype {', '.join(DTYPES)}")
    return name


def free_memory_bytes(device: str) -> int:
    """Memory that a process could still take on `device`."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
