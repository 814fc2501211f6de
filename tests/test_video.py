from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch

from iwsft import GaussianPolicy
from iwsft.evaluation import evaluate
from iwsft.video import check_recording

STEPS = 7


class Slide(gym.Env[Any, Any]):
    """A number that actions move; its picture is as bright as the number of the step."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-9.0, 9.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, render_mode: str | None = None, broken: bool = False) -> None:
        self.render_mode, self.broken, self.steps = render_mode, broken, 0

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.place, self.steps = self.np_random.random(1).astype(np.float32), 0
        return self.place, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place, self.steps = self.place + 0.1 * action, self.steps + 1
        return self.place, float(self.place[0]), self.steps == STEPS, False, {}

    def render(self) -> Any:
        if self.broken:
            raise AttributeError("'NoneType' object has no attribute 'glGetError'")
        return np.full((64, 64, 3), 30 * self.steps, np.uint8)[::-1]  # as MuJoCo's: a view


class Invisible(Slide):
    """It has no pictures."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for env in (Slide, Invisible):
        gym.register(f"{env.__name__}-v0", env)
    yield
    for env in (Slide, Invisible):
        gym.registry.pop(f"{env.__name__}-v0")


def test_a_video_shows_the_first_episode_and_changes_no_number(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    torch.manual_seed(0)
    policy = GaussianPolicy(1, 1)
    file = tmp_path / "new" / "episode.mp4"
    recorded = evaluate(policy, "Slide-v0", episodes=5, num_envs=2, video=file)
    plain = evaluate(policy, "Slide-v0", episodes=5, num_envs=2)
    assert replace(recorded, wall_seconds=0) == replace(plain, wall_seconds=0)
    about, *pictures = ffmpeg.read_frames(file)
    assert (about["fps"], about["size"]) == (10, (64, 64))
    brightness = [float(np.frombuffer(picture, np.uint8).mean()) for picture in pictures]
    np.testing.assert_allclose(brightness, 30 * np.arange(1, STEPS + 1), atol=3)
    assert [path.name for path in file.parent.iterdir()] == ["episode.mp4"]


def test_what_can_not_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, file = GaussianPolicy(1, 1), tmp_path / "episode.mp4"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "imageio_ffmpeg", None)
        with pytest.raises(ImportError, match=r"pip install 'iwsft\[video\]'"):
            evaluate(policy, "Slide-v0", episodes=1, video=file)
    pytest.importorskip("imageio_ffmpeg")
    for name in ("episode", "episode.gif"):
        with pytest.raises(
            ValueError, match=rf"{name} is not the name of an MP4 file; call it .*episode\.mp4"
        ):
            evaluate(policy, "Slide-v0", episodes=1, video=tmp_path / name)
    with pytest.raises(ValueError, match="draws no pictures"):
        evaluate(policy, "Invisible-v0", episodes=1, video=file)
    with pytest.raises(ValueError, match="this machine cannot draw Slide-v0: install libegl1"):
        check_recording("Slide-v0", {"broken": True})
    assert not list(tmp_path.iterdir())
