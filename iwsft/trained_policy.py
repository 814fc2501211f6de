"""A trained policy on disk, and what one does with it: act, evaluate, record, export."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iwsft import checkpoint, environments
from iwsft.acting import IS_INIT, PolicyInputs, act, acting
from iwsft.evaluation import Evaluation, evaluate
from iwsft.extras import named
from iwsft.files import write
from iwsft.policies import GaussianPolicy, MixturePolicy
from iwsft.trajectory import ACTION, OBSERVATION
from iwsft.update import form_of

with named():
    import gymnasium as gym

FILE = "policy.pt"
_RUN = "a finished run's folder, OUT/d4rl/DATASET/ALGO/seed-K"
# Keys of a policy's parameters in a TorchRL loss, functional or not.
_IN_LOSS = ("actor_network_params.", "actor_network.")


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy that is ready to act, and the environment that it was trained for, where known.

    Attributes:
        module: The policy as :func:`iwsft.evaluate` takes it: it reads ``observation`` as the
            environment gives it (normalisation is part of the policy) and writes ``action`` in
            [-1, 1]. It is on the CPU.
        env_id, env_kwargs: The environment, see :func:`iwsft.environments.make`.
        reference_scores: D4RL's (minimum, maximum) return, or None without a normalised score.
        observation_dim: Size of an observation.
        action_dtype: NumPy's name of the dtype of the environment's actions. To a dtype of whole
            numbers actions are rounded, as in evaluation.
    """

    module: TensorDictModuleBase
    env_id: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reference_scores: tuple[float, float] | None = None
    observation_dim: int | None = None
    action_dtype: str = "float32"

    @property
    def action_bounds(self) -> tuple[Any, Any]:
        """Lower and upper bound of the environment's actions, numbers or lists."""
        low, high = self.env_kwargs.get("action_bounds", (-1.0, 1.0))
        return low, high

    @property
    def has_memory(self) -> bool:
        """Whether an action depends on earlier steps of its episode, as in ``dt``."""
        return IS_INIT in self.module.in_keys

    def make(self, **kwargs: Any) -> gym.Env[Any, Any]:
        """Make the environment, with flat observations and actions in its own range.

        ``kwargs`` are further arguments of the environment, such as ``render_mode="human"``.
        """
        known = {name: value for name, value in self.env_kwargs.items() if name != "action_bounds"}
        env = environments.make(self._known_env_id(), **{**known, **kwargs})
        if isinstance(env.observation_space, gym.spaces.Box):
            return env
        flatten = environments.flattener(env)
        size = flatten(env.observation_space.sample()).shape
        space = gym.spaces.Box(-np.inf, np.inf, size, np.float64)
        return gym.wrappers.TransformObservation(env, flatten, space)

    def act(
        self, observation: ArrayLike, *, first: bool | None = None, reward: float = 0.0
    ) -> NDArray[Any]:
        """Return the policy's action (the mean of a Gaussian) in the environment's range and dtype.

        Args:
            observation: One observation ``[obs]``, or several ``[n, obs]`` of a policy without a
                memory.
            first: Whether this is the first step of an episode. Only a policy with a memory needs
                it, and ``reward``, and then sees one episode after the other.
            reward: Reward of the last action.
        """
        rows = np.atleast_2d(np.asarray(observation, np.float32))
        if rows.shape[1] != (self.observation_dim or rows.shape[1]):
            raise ValueError(f"observations have size {self.observation_dim}, got {rows.shape[1]}")
        if self.has_memory and (first is None or len(rows) > 1):
            raise ValueError("this policy has a memory: pass one observation, first= and reward=")
        inputs = PolicyInputs(len(rows), rows.shape[1])
        for row, values in enumerate(rows):
            inputs.begin(row, values, f"row {row}")
        if first is False:
            inputs.follow(0, rows[0], reward)
        with acting(self.module):
            actions = act(self.module, inputs)[: len(rows)]
        low, high = (np.asarray(bound, np.float64) for bound in self.action_bounds)
        scaled = (high + low) / 2 + (high - low) / 2 * np.clip(actions, -1.0, 1.0)
        sent = environments.in_dtype(scaled, self.action_dtype)
        return sent.reshape(*np.shape(observation)[:-1], -1)

    def evaluate(self, **options: Any) -> Evaluation:
        """Score the policy in its environment; the options are those of :func:`iwsft.evaluate`."""
        known: dict[str, Any] = {"env_kwargs": self.env_kwargs}
        known["reference_scores"] = self.reference_scores
        return evaluate(self.module, self._known_env_id(), **known, **options)

    def export(self, path: str | Path, observation_dim: int | None = None) -> Path:
        """Write the policy as a program of ``torch.export``, which needs torch alone.

        ``torch.export.load(path).module()`` maps observations, float32 ``[n, obs]``, to actions in
        the environment's own range, float32 ``[n, act]``, or whole numbers in the dtype of an
        environment that takes those. The file ends in ``.pt2`` by custom.

        A policy with a memory can't be exported.
        """
        if self.has_memory:
            raise ValueError("a policy with a memory can't be exported: it needs the history")
        size = observation_dim or self.observation_dim
        if size is None:
            raise ValueError("the checkpoint does not say how large observations are: pass it")
        rows = {"observation": {0: torch.export.Dim("n")}}
        program = _Program(self.module, *self.action_bounds, self.action_dtype)
        with acting(self.module):
            exported = torch.export.export(program, (torch.zeros(2, size),), dynamic_shapes=rows)
        # Through memory: torch gives its archive the name of the file.
        buffer = io.BytesIO()
        torch.export.save(exported, buffer)
        write(Path(path), buffer.getbuffer())
        return Path(path)

    def _known_env_id(self) -> str:
        if self.env_id is None:
            raise ValueError("the checkpoint names no environment; call iwsft.evaluate with one")
        return self.env_id


class _Program(nn.Module):
    """From observations to actions in the range ``low`` to ``high``."""

    def __init__(self, module: TensorDictModuleBase, low: Any, high: Any, dtype: str) -> None:
        super().__init__()
        self.whole = getattr(torch, dtype) if np.issubdtype(dtype, np.integer) else None
        self.policy = module
        # In float64, as the environments of data with other bounds compute it.
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (low, high))
        self.register_buffer("middle", (high + low) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    def forward(self, observation: Tensor) -> Tensor:
        rows = TensorDict({OBSERVATION: observation}, [observation.shape[0]])
        action = self.policy(rows)[ACTION].detach().clamp(-1.0, 1.0)
        scaled = self.middle + self.half_range * action.double()
        return scaled.float() if self.whole is None else scaled.round().to(self.whole)


def save_policy(
    folder: Path,
    policy: TrainedPolicy,
    *,
    algo: str,
    action_dim: int,
    settings: Any = None,
) -> None:
    """Write ``policy.pt``: parameters, and the plain values that :func:`load_policy` needs.

    ``settings`` are the dataclass of the settings of a baseline, which ``algo`` names; without
    them the policy is a :class:`GaussianPolicy` or :class:`MixturePolicy` of the default form.
    """
    content = {
        "algo": algo,
        "observation_dim": policy.observation_dim,
        "action_dim": action_dim,
        "settings": None if settings is None else asdict(settings),
        "components": getattr(policy.module, "components", None),
        "action_dtype": policy.action_dtype,
        "env_id": policy.env_id,
        "env_kwargs": dict(policy.env_kwargs),
        "reference_scores": policy.reference_scores,
        "state": {key: value.cpu() for key, value in policy.module.state_dict().items()},
    }
    checkpoint.write(folder / FILE, content)


def folder_of_run(path: str | Path) -> Path:
    """Return the folder of a run from that folder, its ``checkpoint``, or a file of either."""
    folder = Path(path).expanduser()
    while folder.name in (FILE, checkpoint.FILE, checkpoint.FOLDER):
        folder = folder.parent
    return folder


def load_policy(
    folder: str | Path,
    policy: TensorDictModuleBase | None = None,
    *,
    trust_env_module: bool = False,
) -> TrainedPolicy:
    """Load a trained policy, ready to act, on the CPU.

    Args:
        folder: Folder of a finished run of ``iwsft d4rl``, ``OUT/d4rl/DATASET/ALGO/seed-K``; or,
            with ``policy``, the folder of :func:`iwsft.training.fit` or its ``checkpoint``.
        policy: Policy of the same form as that of the checkpoint, whose parameters are replaced.
        trust_env_module: Whether the module that the policy's environment names may be imported
            when the environment is made. Its code can do anything.

    Raises:
        FileNotFoundError: There is no policy, or no checkpoint.
        iwsft.checkpoint.CheckpointError: The file is damaged, or does not fit.
        ValueError: The environment imports a module, and that is not trusted.
    """
    path = folder_of_run(folder)
    if policy is not None:
        return TrainedPolicy(_from_checkpoint(path, policy))
    if (path / checkpoint.FOLDER / "config.json").exists():
        way_out = "transformers' AutoModelForCausalLM.from_pretrained loads"
        raise ValueError(f"{path} is of a language model, which {way_out}: {path}/checkpoint")
    if not (path / FILE).exists():
        way_out = f"pass {_RUN}, or policy= for the checkpoint of an unfinished one"
        raise FileNotFoundError(f"no {FILE} in {path}; {way_out}")
    loaded = _from_run(path / FILE)
    modules = environments.modules_to_import(loaded.env_id or "", loaded.env_kwargs)
    if modules and not trust_env_module:
        raise ValueError(f"{path} imports {modules}; pass trust_env_module=True if you trust that")
    return loaded


@contextmanager
def _fitting(path: Path, problem: str, way_out: str) -> Iterator[dict[str, Any]]:
    """Read a file; errors in its use say that it does not fit."""
    content = checkpoint.read(path, way_out)
    try:
        yield content
    except checkpoint.CORRUPT as error:
        reason = f"{type(error).__name__}: {error}"
        raise checkpoint.CheckpointError(f"{path} {problem} ({reason}); {way_out}") from error


def _from_run(path: Path) -> TrainedPolicy:
    """Build the policy of a run from its file."""
    with _fitting(path, "does not fit this version", "run that seed again") as content:
        sizes = content["observation_dim"], content["action_dim"]
        if content.get("components") is not None:
            module: TensorDictModuleBase = MixturePolicy(*sizes, components=content["components"])
        elif content["settings"] is None:
            module = GaussianPolicy(*sizes)
        else:
            # The baselines build on this package, which therefore imports them by name.
            baseline = import_module("baselines").algorithm(content["algo"])
            module = baseline.policy(*sizes, baseline.Settings(**content["settings"]))
        module.load_state_dict(content["state"])
        scores, env_kwargs = content.get("reference_scores"), content["env_kwargs"]
        dtype = content.get("action_dtype", "float32")
        return TrainedPolicy(module, content["env_id"], env_kwargs, scores, sizes[0], dtype)


def _from_checkpoint(folder: Path, policy: TensorDictModuleBase) -> TensorDictModuleBase:
    """Put the parameters that a training's checkpoint has for its actor into ``policy``."""
    path = folder / checkpoint.FOLDER / checkpoint.FILE
    if not path.exists():
        raise FileNotFoundError(f"no {path}; pass the folder of a training")
    with _fitting(path, "holds no policy of this form", "pass one that does") as content:
        loss = content["state"]["loss"]
        prefixes = (each for each in _IN_LOSS if any(key.startswith(each) for key in loss))
        prefix = next(prefixes, _IN_LOSS[0])
        state = {key.removeprefix(prefix): loss[key] for key in loss if key.startswith(prefix)}
        policy.load_state_dict(state)
    known, own = content["state"].get("form", {}), form_of(policy, "loss.actor_network.")
    both = known.keys() & own.keys()
    if differ := checkpoint.differences({n: known[n] for n in both}, {n: own[n] for n in both}):
        warnings.warn(f"the policy is not made as the trained one was: {differ}", stacklevel=3)
    settings = json.loads(content["settings"])
    algo, own = settings.get("algo"), settings.get("baseline")
    baselines = import_module("baselines")
    # The normalisation is fitted to the data and belongs to policy.pt alone.
    if own is not None and algo in baselines.BASELINES and own.get("normalize", True):
        baseline = baselines.algorithm(algo)
        if hasattr(baseline.policy(1, 1, baseline.Settings(**own)), "normalization"):
            problem = f"{algo} was trained on normalised observations"
            way_out = "give the policy baselines.normalization, or finish the run"
            warnings.warn(f"{problem}; {way_out}", stacklevel=3)
    return policy
