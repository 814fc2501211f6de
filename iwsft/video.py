"""Videos of episodes, drawn off screen."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from iwsft import environments
from iwsft.extras import named, require
from iwsft.files import written_whole

with named():
    import gymnasium as gym

_WRITER = "imageio_ffmpeg"
# MuJoCo's own choice is a window, which a machine without a screen does not have.
_BACKEND = "MUJOCO_GL"
_NO_SCREEN = "egl"


class FirstEpisode(gym.Wrapper[Any, Any, Any, Any]):
    """``env`` that gives ``write`` a picture of each step of its first episode."""

    def __init__(self, env: gym.Env[Any, Any], write: Callable[[Any], None]) -> None:
        super().__init__(env)
        self._write = write
        self._over = False

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        out = super().step(action)
        if not self._over:
            # Pictures of MuJoCo are flipped views.
            self._write(np.ascontiguousarray(self.env.render()))
        self._over |= out[2] or out[3]
        return out


@contextmanager
def recorded(path: Path, env_id: str, env_kwargs: Mapping[str, Any]) -> Iterator[FirstEpisode]:
    """Make an environment whose first episode is written to ``path``, an MP4 file.

    The file is written whole when the block ends without an error. An ImportError or a ValueError
    says that the file has another ending, the environment gives no pictures, or this machine can't
    draw or write them.
    """
    if path.suffix.lower() != ".mp4":
        name = path.with_suffix(".mp4")
        raise ValueError(f"{path} is not the name of an MP4 file; call it {name}")
    env, (height, width, _) = _make(env_id, env_kwargs)
    fps = env.metadata.get("render_fps", 30)
    with written_whole(path) as partial, env:
        # The name of the partial file does not say what it is.
        kind = ["-f", "mp4"]
        pictures = import_module(_WRITER).write_frames(
            partial, (width, height), fps=fps, output_params=kind
        )
        with closing(pictures):
            pictures.send(None)
            yield FirstEpisode(env, pictures.send)


def check_recording(env_id: str, env_kwargs: Mapping[str, Any]) -> None:
    """Draw one picture of an environment, to see before training that a video can be recorded.

    The errors are those of :func:`recorded`.
    """
    env, _ = _make(env_id, env_kwargs)
    with env:
        env.reset(seed=0)


def _make(
    env_id: str, env_kwargs: Mapping[str, Any]
) -> tuple[gym.Env[Any, Any], tuple[int, int, int]]:
    """Return an environment that has drawn a picture, and the shape of its pictures."""
    require(_WRITER)
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        os.environ.setdefault(_BACKEND, _NO_SCREEN)
    env = environments.make(env_id, **env_kwargs)
    modes = env.metadata.get("render_modes", [])
    env.close()
    if "rgb_array" not in modes:
        raise ValueError(f"{env_id} draws no pictures for a video; it has the render modes {modes}")
    try:
        # The error says what their warnings say.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env = environments.make(env_id, **{**env_kwargs, "render_mode": "rgb_array"})
            env.reset(seed=0)
            shape = np.asarray(env.render()).shape
    # Graphics libraries raise errors of their own, of any kind.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        way_out = "install libegl1, or libosmesa6 with MUJOCO_GL=osmesa, or leave out the video"
        raise ValueError(f"this machine cannot draw {env_id}: {way_out} ({reason})") from error
    return env, shape
