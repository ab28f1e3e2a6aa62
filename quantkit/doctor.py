"""What this machine and this environment can do, and what would have to be installed for the rest."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.environment import cpu_model, package_versions


def examine() -> dict[str, Any]:
    """Versions, devices, memory, disk, engines and what is missing, as numbers and words for JSON.

    Keys: quantkit, python, platform, packages {name: version or None}, cpu {model, cores, threads}, gpus [{name,
    memory_bytes}], memory {total_bytes, available_bytes}, disk {folder, free_bytes}, engines [{name, formats,
    available, reason}], formats {name: engine that runs it here or None}, missing [one line each].
    """
    import psutil
    import torch

    from quantkit.formats import FORMATS

    engines = _engines()
    ready = {engine["name"] for engine in engines if engine["available"]}
    formats = {
        name: next((engine for engine in known.engines if engine in ready), None) for name, known in FORMATS.items()
    }
    memory = psutil.virtual_memory()
    return {
        "quantkit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": package_versions(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": _gpus(),
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "disk": {"folder": ".", "free_bytes": shutil.disk_usage(Path.cwd()).free},
        "engines": engines,
        "formats": formats,
        "missing": [f"{engine['name']}: {engine['reason']}" for engine in engines if not engine["available"]],
    }


def _engines() -> list[dict[str, Any]]:
    """Every engine, the formats it runs, and why it cannot run here if so."""
    from quantkit.engines import ENGINES
    from quantkit.formats import FORMATS

    found = []
    for name, engine in ENGINES.items():
        reason = engine.available()
        runs = [known for known, kind in FORMATS.items() if name in kind.engines]
        found.append({"name": name, "formats": runs, "available": reason is None, "reason": reason})
    return found


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in devices]
