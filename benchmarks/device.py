"""The device that an option names."""

from __future__ import annotations


def chosen_device(device: str | None) -> str:
    """The device that --device names, and without it a GPU where there is one."""
    if device is not None:
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Check that torch knows a device, and that it is there."""
    if device == "cpu":
        return
    import torch

    try:
        torch.ones(1, device=device).item()
    # torch raises these for unknown names and for devices that are not there.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        # For some devices torch lists all of its backends in the next sentence.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"--device {device} can't be used here: {reason}; cpu can") from error
