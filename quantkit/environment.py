"""What a result was made with: versions, processor, threads, memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "bitsandbytes", "gguf", "datasets", "lm-eval", "numba", "gptqmodel", "xllamacpp")

CPUINFO, STATUS = "/proc/cpuinfo", "/proc/self/status"


def package_versions() -> dict[str, str | None]:
    """Installed versions of what the results depend on; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """The processor's name as the system tells it, with its family and model: virtual machines call generations of
    processors by one name, such as "AMD EPYC"."""
    try:
        told = Path(CPUINFO).read_text().split("\n\n", 1)[0]  # of the first of them
    except OSError:
        told = ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in told.splitlines())}
    name = facts.get("model name")
    if not name:
        return platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def environment(device: str = "cpu") -> dict[str, Any]:
    """All of it, for a manifest or a results file."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "packages": package_versions(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def rss_bytes() -> int:
    """The memory this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most memory this process ever held.

    On Linux from the process's own memory map: what getrusage tells there begins with the memory of the process that
    started this one.
    """
    try:
        lines = Path(STATUS).read_bytes().splitlines()  # a process may have a name that is no text
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
