"""Energy counters of the machine, where it has any: Intel's and AMD's RAPL under Linux, NVIDIA's NVML."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
"""Where Linux has the RAPL counters (Documentation/power/powercap/powercap.rst of the kernel)."""


class EnergyCounter:
    """What the processor packages, or one GPU, took since the last `restart`; everything that ran there counts.

    available: whether there is a counter that this user may read.
    """

    def __init__(self, device: str):
        self._gpu = _gpu() if device == "cuda" else None
        self._packages = [] if device == "cuda" else _packages()
        self._before: list[int] = []
        self.restart()

    @property
    def available(self) -> bool:
        return self._gpu is not None or bool(self._packages)

    def restart(self) -> None:
        """Count from now on."""
        self._before = self._read()

    def joules(self) -> float:
        """Joules since `restart`. A package's counter that has begun again from 0 is taken to have done so once."""
        if self._gpu is not None:
            return (self._read()[0] - self._before[0]) / 1e3  # NVML counts millijoules
        total = 0
        for package, before, now in zip(self._packages, self._before, self._read(), strict=True):
            around = int((package / "max_energy_range_uj").read_text()) if now < before else 0
            total += now - before + around
        return total / 1e6

    def _read(self) -> list[int]:
        if self._gpu is not None:
            import pynvml

            return [int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu))]
        return [int((package / "energy_uj").read_text()) for package in self._packages]


def _packages() -> list[Path]:
    """The counters of whole packages; those of parts are in them already."""
    found = []
    for folder in sorted(POWERCAP.glob("*:*")):
        try:
            if (folder / "name").read_text().startswith("package"):
                int((folder / "energy_uj").read_text())
                found.append(folder)
        except (OSError, ValueError):  # since 2020 only root may read them
            continue
    return found


def _gpu() -> object | None:
    if find_spec("pynvml") is None:
        return None
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        handle: object = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return handle
