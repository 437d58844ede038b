"""Describe the machine for reports: package versions, processor, peak memory."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import onnxruntime as ort
import psutil
import torch

from tdcompile.ir.target import Target

_ONNXRUNTIME_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-training",
)
_REPORTED_PACKAGES = ("tdcompile", "torch", "onnx", "tensorly", "numpy")


@functools.cache
def distributions() -> dict[str, str]:
    """Return the installed packages that contain onnxruntime, with their versions; there should be one."""
    found = {}
    for name in _ONNXRUNTIME_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(target: Target) -> dict[str, str]:
    """Return the versions, the machine and the target that a measured figure depends on."""
    found = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES},
        **(distributions() or {"onnxruntime": ort.__version__}),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cores": str(psutil.cpu_count(logical=False) or os.cpu_count()),
        "threads": str(target.threads),
        "provider": target.provider,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB (10⁶ bytes)."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource  # not available on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, KiB elsewhere
