"""One run: a trained policy, its evaluation, its result.

Whatever a kill leaves of it is continued by the same call: training from its last checkpoint, and
all that comes after training is done again from the trained policy.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from benchmarks.d4rl.learn import Say, baseline, clone, curated, fine_tune, reference
from benchmarks.d4rl.plan import BENCHMARK, Plan, settings_of
from benchmarks.d4rl.saved import save_policy
from benchmarks.d4rl.task import Task
from benchmarks.runs import alone_in, write_json
from iwsft import checkpoint, metrics
from iwsft.files import written_whole
from iwsft.reference import annotate_reference
from iwsft.training import Cost


def run(plan: Plan, say: Say) -> dict[str, Any]:
    """Train and score one seed; its folder must be claimed (see ``plan.claim``).

    Raises:
        FileExistsError: another process works in the folder.
    """
    # One thread a run: runs beside each other do not fight, and the numbers are the same alone.
    torch.set_num_threads(1)
    task = Task.load(plan.dataset, plan.pretrain_dataset)
    folder = plan.folder(task)
    with alone_in(folder, wait=False):
        return _run(plan, task, folder, say)


def _run(plan: Plan, task: Task, folder: Path, say: Say) -> dict[str, Any]:
    data: TensorDictBase = task.dataset.trajectories.to(plan.device)
    reference_cost = Cost(0.0, 0.0)
    if plan.baseline is not None:
        policy, cost = baseline(plan, task, data, folder, say)
    elif plan.from_reference:
        policy, kept, reference_cost = reference(plan, task, say)
        annotate_reference(policy, data, cache=kept)
        cost = fine_tune(plan, task, curated(plan, data), policy, folder, say)
    elif plan.cuts or plan.cloning != plan.reference or task.pretrain is not task.dataset:
        policy, cost = clone(
            plan,
            task,
            curated(plan, data),
            plan.cloning,
            folder,
            settings_of(plan, task),
            partial(say, "cloning"),
        )
    else:
        policy, kept, cost = reference(plan, task, say)
        _copy_training(kept, folder)
    save_policy(folder, plan, task, policy)
    since_cpu = time.process_time()
    final = task.score(policy, episodes=plan.eval_episodes, seed=plan.seed, device=plan.device)
    evaluation_cpu = time.process_time() - since_cpu
    steps, published = plan.steps_of(task)
    result = {
        "benchmark": BENCHMARK,
        "dataset": task.name,
        "algo": plan.algo,
        "seed": plan.seed,
        "env_id": final.env_id,
        "preset": plan.preset,
        "estimator": plan.estimator,
        "steps": steps,
        **({} if steps == published else {"published_steps": published}),
        "normalized_score": final.score,
        "episode_scores": final.normalized_scores,
        "episode_returns": final.returns,
        "episode_lengths": final.lengths,
        "return_mean": final.return_mean,
        **(
            {}
            if final.successes is None
            else {
                "success_rate": float(np.mean(final.successes)),
                "episode_successes": final.successes,
            }
        ),
        "episodes": len(final.returns),
        "wall_seconds": cost.wall_seconds + final.wall_seconds,
        "cpu_seconds": cost.cpu_seconds + evaluation_cpu,
        "evaluation_cpu_seconds": evaluation_cpu,
        "reference_wall_seconds": reference_cost.wall_seconds,
        "reference_cpu_seconds": reference_cost.cpu_seconds,
        "versions": final.versions,
    }
    write_json(folder / "result.json", result)
    return result


def _copy_training(source: Path, folder: Path) -> None:
    """Copy what a training left, each file whole, so that a kill leaves nothing that misleads."""
    state, rows = source / checkpoint.FOLDER / checkpoint.FILE, source / metrics.FILE
    for path in (state, rows, *(source / metrics.BOARD).glob("*")):
        with written_whole(folder / path.relative_to(source)) as partial_path:
            shutil.copyfile(path, partial_path)
