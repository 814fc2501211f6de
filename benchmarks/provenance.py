"""What stands beside every figure: versions and hardware, in JSON files written whole."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from iwsft.files import written_whole

_PACKAGES = ("torch", "tensordict", "torchrl", "gymnasium", "mujoco", "numpy")


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def hardware(device: str) -> dict[str, str | int | None]:
    """What a run runs on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {"device": device, "name": name, "cpus": os.cpu_count(), "system": platform.system()}


def _processor() -> str:
    """The processor's name where the system tells it, or its architecture."""
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
