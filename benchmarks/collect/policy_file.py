"""Policies from NumPy files of plain arrays, such as the public ones in ``policies/``.

A file has the layers ``W0``, ``b0``, ... (``n_hidden`` of them, weights ``[out, in]``), ``W_out``
and ``b_out``, the name of the ``activation`` between them, and whether ``squash`` puts a tanh on
the action. Two things are optional: a log standard deviation, either ``log_std`` ``[act]`` or the
layer ``W_logstd`` and ``b_logstd`` on the last hidden layer; and normalised observations,
(observation - ``obs_mean``) / sqrt(``obs_var`` + ``obs_eps``) cut at +- ``obs_clip``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type

from iwsft.trajectory import ACTION, OBSERVATION

SUFFIX = ".npz"
_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class ArrayPolicy(nn.Module):
    """A Gaussian policy of the arrays of a file, in float32.

    It returns the mean, or within TorchRL's exploration type RANDOM a draw. ``squash`` acts on
    either.
    """

    log_std: Tensor | None
    obs_mean: Tensor | None
    obs_var: Tensor
    obs_eps: Tensor
    obs_clip: Tensor

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        layers = range(int(arrays["n_hidden"]))
        self._hidden = nn.ModuleList(_layer(arrays, f"W{i}", f"b{i}") for i in layers)
        self._activation = _ACTIVATIONS[str(arrays["activation"])]
        self._mean = _layer(arrays, "W_out", "b_out")
        self._squash = bool(arrays["squash"])
        self._std = _layer(arrays, "W_logstd", "b_logstd") if "W_logstd" in arrays else None
        normalized = ("obs_mean", "obs_var", "obs_eps", "obs_clip")
        for names in (("log_std",), normalized):
            for name in names:
                values = _tensor(arrays, name) if names[0] in arrays else None
                self.register_buffer(name, values)

    @property
    def has_std(self) -> bool:
        """Whether it can be drawn from."""
        return self._std is not None or self.log_std is not None

    def forward(self, observation: Tensor) -> Tensor:
        """Return an action ``[..., act]`` for each observation ``[..., obs]``."""
        hidden = observation
        if self.obs_mean is not None:
            hidden = (hidden - self.obs_mean) / (self.obs_var + self.obs_eps).sqrt()
            hidden = torch.clamp(hidden, -self.obs_clip, self.obs_clip)
        for layer in self._hidden:
            hidden = self._activation(layer(hidden))
        action = self._mean(hidden)
        # The bounds are those of Stable-Baselines3's SAC and TQC.
        log_std = self.log_std if self._std is None else self._std(hidden).clamp(-20, 2)
        if exploration_type() == ExplorationType.RANDOM and log_std is not None:
            action = action + log_std.exp() * torch.randn_like(action)
        return torch.tanh(action) if self._squash else action


def _layer(arrays: Mapping[str, NDArray[Any]], weight: str, bias: str) -> nn.Linear:
    layer = nn.Linear(*arrays[weight].T.shape)
    layer.load_state_dict({"weight": _tensor(arrays, weight), "bias": _tensor(arrays, bias)})
    return layer


def _tensor(arrays: Mapping[str, NDArray[Any]], name: str) -> Tensor:
    return torch.from_numpy(arrays[name].astype(np.float32))


def load(path: Path, *, stochastic: bool) -> TensorDictModule:
    """Return the policy of a file, from observation to action.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It lacks an array, or ``stochastic`` asks for draws and it has no standard
            deviation.
    """
    try:
        with np.load(path) as file:
            policy = ArrayPolicy(dict(file))
    except (EOFError, KeyError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"not a policy's file of arrays ({reason})"
        raise ValueError(f"--policy {path} is {problem}") from error
    if stochastic and not policy.has_std:
        raise ValueError(
            f"--policy {path} has no standard deviation; use --noise, not --stochastic"
        )
    return TensorDictModule(policy, in_keys=[OBSERVATION], out_keys=[ACTION])
