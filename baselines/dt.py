"""Decision Transformer: actions for a target return (Chen et al. 2021, arXiv 2106.01345).

A causal transformer reads the last K steps as (return-to-go, observation, action). It is trained on
the squared error of the action that it predicts from each observation. To act, it gets a target
return as the first return-to-go.

Network and loss are TorchRL's (``DTActor``, ``DTLoss``), on a GPT-2 of transformers. TorchRL's
network differs from the paper's in one thing: it embeds the position of a token *within the window*
(GPT-2's learned position embedding); the paper embeds the step of the episode. So windows start at
position 0, and short windows are padded at the end, where causal attention does not see the
padding. This equals padding at the start with an attention mask and positions counted from the
first valid step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import DecisionTransformer, DTActor
from torchrl.objectives import DTLoss

from baselines.learner import Learner, check_finite, read_steps
from baselines.normalization import Normalization
from baselines.windows import RETURN_TO_GO, WindowSampler, returns_to_go
from iwsft.acting import IS_INIT, PREVIOUS_REWARD
from iwsft.extras import require
from iwsft.samplers import multiplicities
from iwsft.training import Schedule
from iwsft.trajectory import ACTION, OBSERVATION, REWARD, lengths


@dataclass(frozen=True)
class Settings:
    """Settings of a run; the defaults are those of the paper's locomotion runs.

    Args:
        steps: Number of updates.
        batch_size: Windows of a batch.
        lr: Learning rate of AdamW after the warm-up.
        warmup: Share of the updates that is linear warm-up.
        weight_decay: Weight decay of AdamW, on all parameters.
        clip_norm: Upper limit of the gradient's norm.
        context: K, the steps of a window.
        layers: Layers of the transformer.
        heads: Heads of its attention.
        width: Width of its embeddings; its feed-forward layers have four times as many units.
        dropout: Dropout of embeddings, attention and residuals.
        target_return: Return that actions are conditioned on; None for the best of the data.
        return_scale: Divisor of returns-to-go; None for the largest absolute return-to-go of the
            data.
    """

    steps: int = 100_000
    batch_size: int = 64
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 1e-4
    clip_norm: float = 0.25
    context: int = 20
    layers: int = 3
    heads: int = 1
    width: int = 128
    dropout: float = 0.1
    target_return: float | None = None
    return_scale: float | None = None

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("steps", "batch_size", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is a share of the updates, 0 or more, below 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.return_scale is not None and not self.return_scale > 0:
            raise ValueError(f"return_scale={self.return_scale} must be positive")


# From the table of hyperparameters in the paper's appendix.
_TARGET_RETURNS = {"halfcheetah": 6000.0, "hopper": 3600.0, "walker2d": 5000.0}
_RETURN_SCALE = 1000.0


def published(dataset: str) -> tuple[Settings, str]:
    """Return the published settings for a dataset, and their source in words."""
    paper = "Chen et al. 2021 (arXiv 2106.01345), appendix"
    # The table's warm-up of 10^5 updates is as long as the whole training of the authors' code.
    warmup = "warm-up over a tenth of the updates as in the authors' code"
    task = next((name for name in _TARGET_RETURNS if dataset.lower().startswith(name)), None)
    if task is not None:
        settings = Settings(target_return=_TARGET_RETURNS[task], return_scale=_RETURN_SCALE)
        also = "; the code also evaluates at 12000" if task == "halfcheetah" else ""
        return settings, (
            f"{paper}: {task}, target return {settings.target_return:.0f}{also}; {warmup}"
        )
    return Settings(), (
        f"{paper}: locomotion, nothing published for {dataset}; target return: the best return of "
        f"the dataset, returns-to-go scaled to at most 1; {warmup}"
    )


class DTNetwork(nn.Module):
    """TorchRL's ``DTActor`` on normalised observations and scaled returns-to-go, under a tanh.

    Mean and standard deviation of the observations and the scale are buffers, so that a saved
    network has them.
    """

    return_scale: Tensor

    def __init__(self, observation_dim: int, action_dim: int, settings: Settings) -> None:
        super().__init__()
        # TorchRL's Decision Transformer is a GPT-2 of transformers.
        require("transformers")
        config = DecisionTransformer.DTConfig(
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=settings.heads,
            n_inner=4 * settings.width,
            activation="relu",
            n_positions=3 * settings.context,
            resid_pdrop=settings.dropout,
            attn_pdrop=settings.dropout,
        )
        with _no_warnings_about_tokens():
            self.actor = DTActor(observation_dim, action_dim, config)
        gpt = self.actor.transformer.transformer
        gpt.drop.p = settings.dropout  # not among TorchRL's arguments
        gpt.config.use_cache = False  # every window is read from its start
        self.normalization = Normalization(observation_dim)
        self.register_buffer("return_scale", torch.tensor(settings.return_scale or 1.0))

    def forward(self, observation: Tensor, action: Tensor, return_to_go: Tensor) -> Tensor:
        """Predict the action ``[n, T, act]`` of every step from earlier ones and its observation.

        Only later steps see the action of a step. Returns-to-go ``[n, T, 1]`` are not yet scaled.
        """
        observation = self.normalization(observation)
        return torch.tanh(self.actor(observation, action, return_to_go / self.return_scale))


@contextmanager
def _no_warnings_about_tokens() -> Iterator[None]:
    """Silence a warning: GPT-2's default text tokens, not used here, are out of vocabulary."""
    logger = logging.getLogger("transformers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class DTPolicy(TensorDictModuleBase):
    """A policy that acts with a :class:`DTNetwork`, one step at a time, for a target return.

    Row i of the batch is one environment in every call. The policy keeps its last K observations,
    actions and returns-to-go, and forgets them where ``is_init`` is set. They are not part of the
    ``state_dict``. The return-to-go starts at the target and falls by each reward. The history has
    the policy's own actions, so they should be in the environment's bounds.

    It reads ``observation`` ``[n, obs]``, ``is_init`` bool ``[n, 1]`` and ``reward`` ``[n, 1]`` of
    the last action, and writes ``action`` ``[n, act]``.

    Args:
        network: Network that predicts actions; it is shared, not copied.
        context: K, the number of steps that the network sees.
        target_return: The target return; None leaves it to a loaded ``state_dict``.
    """

    target_return: Tensor
    _observations: Tensor
    _actions: Tensor
    _returns_to_go: Tensor
    _filled: Tensor

    def __init__(self, network: DTNetwork, context: int, target_return: float | None) -> None:
        super().__init__()
        self.in_keys = [OBSERVATION, IS_INIT, PREVIOUS_REWARD]
        self.out_keys = [ACTION]
        self.network = network
        self.context = context
        target = math.nan if target_return is None else target_return
        self.register_buffer("target_return", torch.tensor(target))
        transformer = network.actor.transformer
        for name, size in (
            ("_observations", transformer.state_dim),
            ("_actions", transformer.action_dim),
            ("_returns_to_go", 1),
        ):
            self.register_buffer(name, torch.zeros(0, context, size), persistent=False)
        self.register_buffer("_filled", torch.zeros(0, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Append a step to the history of each row, and write its action.

        A ValueError says that there is no target return, or that a row has no history to continue.
        """
        observation = tensordict.get(OBSERVATION)
        first = tensordict.get(IS_INIT).reshape(-1, 1)
        reward = tensordict.get(PREVIOUS_REWARD).reshape(-1, 1)
        rows = torch.arange(len(observation), device=observation.device)
        self._begin(first)
        last = self._returns_to_go[rows, self._filled - 1]
        return_to_go = torch.where(first, self.target_return, last - reward)

        full = (self._filled == self.context)[:, None, None]
        at = self._filled.clamp(max=self.context - 1)
        step = (observation, torch.zeros_like(self._actions[:, 0]), return_to_go)
        for window, new in zip(self._windows, step, strict=True):
            window.copy_(torch.where(full, window.roll(-1, 1), window))
            window[rows, at] = new
        action = self.network(*self._windows)[rows, at]
        self._actions[rows, at] = action
        self._filled = at + 1
        return tensordict.set(ACTION, action)

    def _begin(self, first: Tensor) -> None:
        """Forget the history of the rows that start an episode."""
        if bool(first.any()) and not bool(self.target_return.isfinite()):
            raise ValueError(
                "the policy has no target return: set target_return in its settings, or load the "
                "state_dict of a trained one"
            )
        if len(first) != len(self._filled):
            if not bool(first.all()):
                raise ValueError(
                    f"the policy holds the history of {len(self._filled)} rows, not of "
                    f"{len(first)}: every row starts with is_init"
                )
            self._filled = self._filled.new_zeros(len(first))
            self._observations, self._actions, self._returns_to_go = (
                window.new_zeros(len(first), *window.shape[1:]) for window in self._windows
            )
            return
        self._filled.masked_fill_(first[:, 0], 0)
        for window in self._windows:
            window.masked_fill_(first[:, :, None], 0)

    @property
    def _windows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._observations, self._actions, self._returns_to_go


def policy(observation_dim: int, action_dim: int, settings: Settings) -> DTPolicy:
    """Return an untrained policy; an ImportError says that transformers is not installed."""
    network = DTNetwork(observation_dim, action_dim, settings)
    return DTPolicy(network, settings.context, settings.target_return)


def build(trajectories: TensorDictBase, settings: Settings, *, seed: int) -> Learner:
    """Return the parts of a training, see :class:`baselines.learner.Baseline`.

    A ValueError also says that all rewards are 0, so that no return conditions the actions.
    """
    torch.manual_seed(seed)
    trajectories = read_steps(trajectories, (OBSERVATION, ACTION, REWARD))
    sampler = WindowSampler(trajectories, settings.batch_size, context=settings.context, seed=seed)
    observation, action = trajectories.get(OBSERVATION), trajectories.get(ACTION)
    acting = policy(observation.shape[-1], action.shape[-1], settings).to(observation.device)
    _fit_to(acting, trajectories, settings)
    actor: Any = TensorDictModule(
        acting.network, in_keys=[OBSERVATION, ACTION, RETURN_TO_GO], out_keys=[ACTION]
    )
    schedule = Schedule(
        settings.steps,
        settings.lr,
        warmup=round(settings.warmup * settings.steps),
        decay="constant",
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )
    return Learner(acting, DTLoss(actor), sampler, schedule)


def _fit_to(acting: DTPolicy, trajectories: TensorDictBase, settings: Settings) -> None:
    """Set what depends on the data: the scales of observations and returns, and the target."""
    network = acting.network
    network.normalization.load_state_dict(Normalization.of(trajectories).state_dict())
    to_go, sizes = returns_to_go(trajectories), lengths(trajectories)
    # Trajectories that are never drawn set neither scale nor target.
    counted = (multiplicities(trajectories, sizes) > 0).to(sizes.device)
    of_steps = to_go[counted.repeat_interleave(sizes)]
    if not bool(of_steps.any()):
        raise ValueError("all rewards are 0: there is no return to condition actions on")
    if settings.return_scale is None:
        network.return_scale.copy_(of_steps.abs().max())
    if settings.target_return is None:
        acting.target_return.copy_(to_go[(sizes.cumsum(0) - sizes)[counted]].max())
