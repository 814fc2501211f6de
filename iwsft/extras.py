"""Optional packages: the extra of iwsft that installs each, and the error where one is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

_PACKAGES = {
    "cli": "docstring_parser joblib markdown_it matplotlib scipy tyro yaml",
    "cluster": "ray",
    "control": "gymnasium minari mujoco",
    "deepspeed": "deepspeed",
    "language": (
        "accelerate datasets gguf huggingface_hub jinja2 math_verify peft psutil pyarrow "
        "safetensors tokenizers transformers"
    ),
    "robotics": "gymnasium_robotics",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "trl": "trl",
    "video": "imageio_ffmpeg",
    "wandb": "wandb",
}
# Name of the import -> extra.
EXTRAS = {package: extra for extra, names in _PACKAGES.items() for package in sorted(names.split())}


def install(*packages: str) -> str:
    """Return the command that installs packages of ``EXTRAS``."""
    extras = ",".join(dict.fromkeys(EXTRAS[package] for package in packages))
    return f"pip install 'iwsft[{extras}]'"


def require(*packages: str) -> None:
    """Check that packages of ``EXTRAS`` are installed (ImportError), without importing them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(_message(missing))


@contextmanager
def named() -> Iterator[None]:
    """Turn the error of an import into that of :func:`require`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise ImportError(_message([error.name])) from error


def _message(packages: Sequence[str]) -> str:
    verb = "is" if len(packages) == 1 else "are"
    return f"{', '.join(packages)} {verb} not installed: {install(*packages)}"
