"""Trained policies on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensordict.nn import TensorDictModuleBase

import baselines
from benchmarks.d4rl.run import Run, Task, sizes
from benchmarks.d4rl.settings import find_algorithm
from iwsft import checkpoint
from iwsft.policies import GaussianPolicy

FILE = "policy.pt"


def save_policy(run: Run, task: Task, policy: TensorDictModuleBase) -> None:
    """Write ``policy.pt``: parameters, and the plain values that :func:`load_policy` needs."""
    observation_dim, action_dim = sizes(task.dataset.trajectories)
    content = {
        "algo": run.algo,
        "observation_dim": observation_dim,
        "action_dim": action_dim,
        "settings": None if run.baseline is None else asdict(run.baseline_settings[0]),
        "env_id": task.env_id,
        "env_kwargs": dict(task.dataset.env_kwargs),
        "state": {key: value.cpu() for key, value in policy.state_dict().items()},
    }
    checkpoint.write(run.folder / FILE, content)


def load_policy(folder: str | Path) -> tuple[TensorDictModuleBase, str, dict[str, Any]]:
    """Load the policy of a finished run.

    Args:
        folder: Folder of the run, ``OUT/d4rl/DATASET/ALGO/seed-K``.

    Returns:
        The policy on the CPU, and the id and arguments of its environment.

    Raises:
        FileNotFoundError: The folder holds no policy.
        CheckpointError: The file is damaged, or not of a run.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"no {FILE} in {folder}; pass the folder of a finished run, "
            "OUT/d4rl/DATASET/ALGO/seed-K"
        )
    way_out = "run that seed again"
    content = checkpoint.read(path, way_out)
    try:
        dims = content["observation_dim"], content["action_dim"]
        env_id, env_kwargs = content["env_id"], content["env_kwargs"]
        if content["algo"] in baselines.BASELINES:
            module = baselines.algorithm(content["algo"])
            policy = module.policy(*dims, module.Settings(**content["settings"]))
        else:
            find_algorithm(content["algo"])
            policy = GaussianPolicy(*dims)
        policy.load_state_dict(content["state"])
    except checkpoint.CORRUPT as error:
        raise checkpoint.CheckpointError(
            f"{path} does not fit this version ({type(error).__name__}: {error}); {way_out}"
        ) from error
    return policy, env_id, env_kwargs
