"""Use and memory of the GPUs, through NVIDIA's management library (https://docs.nvidia.com/deploy/nvml-api/)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress


class Gpus:
    """The machine's GPUs as NVML sees them; none, silently, where there is no driver."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            self._handles = []
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            self._handles = []

    def read(self) -> Iterator[tuple[str, str, float]]:
        """Name, dimension and percent: ``GPUUtilization`` is the share of time in which a kernel ran, ``GPUMemoryUtilization``
        the share of the memory in use. What a GPU cannot tell (one cut by MIG) is left out."""
        for index, handle in enumerate(self._handles):
            with suppress(self._nvml.NVMLError):
                yield f"gpu{index}", "GPUUtilization", float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            with suppress(self._nvml.NVMLError):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                yield f"gpu{index}", "GPUMemoryUtilization", 100.0 * memory.used / memory.total

    def close(self) -> None:
        """Let NVML go."""
        if self._handles:
            self._nvml.nvmlShutdown()
