"""Runs of d3rlpy in the folders and files of ours, so that one report shows both."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from benchmarks.d4rl.run import Run, Task, config_of, sizes
from benchmarks.d4rl.train import learning_curve_probe, result_of
from benchmarks.peer import learner as d3rlpy
from benchmarks.peer.settings import APART, config
from benchmarks.runs import alone_in, write_json
from iwsft.checkpoint import CheckpointError, differences
from iwsft.metrics import MetricsLog
from iwsft.training import Row

# Of a folder's config.json, what a run that goes on must agree with.
_DECIDE = ("settings", "eval_episodes")


def claim(plans: Sequence[Run], task: Task) -> list[Run]:
    """Write ``config.json`` of all runs, or of none; the unfinished ones.

    Raises:
        FileExistsError: folders that hold a run, and ``resume`` is off.
        CheckpointError: with ``resume``, folders that hold one of other settings, or of ours.
    """
    configs = {plan: _config(plan, task) for plan in plans}
    held = [plan for plan in plans if _files(plan.folder)]
    if held and not plans[0].options.resume:
        folders = ", ".join(str(plan.folder) for plan in held)
        raise FileExistsError(
            f"{folders}: runs are there already; pass --resume to keep what is finished and to "
            "run the others from their start, or another --out"
        )
    for plan in held:
        path = plan.folder / "config.json"
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path} is no JSON ({error}); choose another --out") from error
        differ = differences(
            *({key: each[key] for key in _DECIDE} for each in (found, configs[plan]))
        )
        if differ:
            raise CheckpointError(
                f"{path.parent} holds a run with other settings: {differ}; run with those, or "
                "choose another --out"
            )
    for plan in plans:
        if plan not in held:
            write_json(plan.folder / "config.json", configs[plan])
    return [plan for plan in plans if not (plan.folder / "result.json").exists()]


def run(plan: Run, task: Task, say: Callable[[Row], None]) -> dict[str, Any]:
    """Train and score one seed on one thread; its folder must be claimed.

    A run that was cut off starts again: d3rlpy keeps no state of its draws.
    """
    torch.set_num_threads(1)
    folder = plan.folder
    with alone_in(folder, wait=False):
        settings, _ = plan.baseline_settings
        steps = plan.updates
        trajectories = task.dataset.trajectories
        since_wall, since_cpu = time.perf_counter(), time.process_time()
        data = d3rlpy.replay(plan.algo, trajectories)
        trained = d3rlpy.create(config(plan.algo, settings), *sizes(trajectories), seed=plan.seed)
        policy = d3rlpy.policy(trained)
        probe = learning_curve_probe(plan, task, policy, steps)
        seen = 0
        with MetricsLog(folder) as log:
            for step, losses in d3rlpy.train(trained, data, steps):
                row: Row = {"step": step, **losses}
                if step // probe.every > seen // probe.every or step == steps:
                    row |= probe.look(TensorDict())
                row["wall_seconds"] = time.perf_counter() - since_wall
                seen = step
                log.write(row)
                say(row)
        evaluation_since = time.process_time()
        final = task.score(
            policy, episodes=plan.options.eval_episodes, seed=plan.seed, device="cpu"
        )
        result = {
            **result_of(plan, final, peer=_peer()),
            "wall_seconds": time.perf_counter() - since_wall,
            "cpu_seconds": time.process_time() - since_cpu,
            "evaluation_cpu_seconds": time.process_time() - evaluation_since,
            "versions": final.versions,
        }
        write_json(folder / "result.json", result)
    return result


def _config(plan: Run, task: Task) -> dict[str, Any]:
    ours = config_of(plan, task)
    told = config(plan.algo, plan.baseline_settings[0])
    return {
        **{key: value for key, value in ours.items() if key not in ("preset", "estimator")},
        "settings": {**ours["settings"], "peer": _peer(), "d3rlpy": told},
        "apart": list(APART[plan.algo]),
        "versions": {**ours["versions"], "d3rlpy": version("d3rlpy")},
        "command": " ".join(["python -m benchmarks.peer", *sys.argv[1:]]),
    }


def _peer() -> str:
    return f"d3rlpy {version('d3rlpy')}"


def _files(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "result.json"))
