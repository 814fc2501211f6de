"""One collection: checked, claimed, collected, written, told."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.collect import policies, sac
from benchmarks.collect.arguments import Arguments
from benchmarks.collect.online import Run
from benchmarks.collect.output import Output, Parts, Rows
from benchmarks.collect.policies import Behaviour
from benchmarks.collect.rollout import Amount, collect
from benchmarks.collect.simulator import Simulator
from benchmarks.runs import alone_in, versions
from iwsft.datasets.write import Provenance


def run(arguments: Arguments) -> None:
    """Collect what the command line asks for, and say what came of it.

    Everything that can be known before is checked before the first step.

    Raises:
        ValueError: arguments that do not fit each other, the policies or the environment.
        FileExistsError: the dataset exists, or is begun and ``resume`` is off.
        iwsft.checkpoint.CheckpointError: what was begun has other settings, or is damaged.
        FloatingPointError: a policy or the simulator has diverged.
        OSError: the disk is full; what is collected stays.
    """
    # One thread: the numbers hang on how many there are, and small networks are no faster with two.
    torch.set_num_threads(1)
    check(arguments)
    output = Output.of(arguments.out)
    if not claimable(output, arguments):
        print(f"{output.name} is finished; nothing to do")
        return
    behaviours = [policies.load(name) for name in arguments.policy]
    simulator = Simulator.of(
        *environment(arguments, behaviours), arguments.env_arg, arguments.max_episode_steps
    )
    for behaviour in behaviours:
        policies.check(behaviour, simulator)
    settings: dict[str, Any] = {
        "env_id": simulator.env_id,
        "env_kwargs": simulator.kwargs,
        "seed": arguments.seed,
        "versions": simulator.versions,
    }
    if arguments.online is None:
        amounts = amounts_of(arguments)
        settings |= {
            "policies": [[b.name, b.fingerprint] for b in behaviours],
            "amounts": [asdict(amount) for amount in amounts],
            "noise": arguments.noise,
            "stochastic": arguments.stochastic,
        }
    else:
        learner = sac.Settings(
            **({"steps": arguments.steps[0]} if arguments.steps else {}),
            random_steps=arguments.random_steps,
        )
        # Where checkpoints fall changes no number, but a resumed run has them where it had.
        settings |= {"sac": asdict(learner), "part_steps": arguments.part_steps}
    with alone_in(output.partial, wait=False):
        parts = Parts(output.partial, settings)
        if arguments.online is None:
            sources, cost = rolled_out(arguments, behaviours, amounts, simulator, parts)
        else:
            sources, cost = trained(arguments, learner, simulator, parts, output)
        rows = parts.rows()
        if not output.path.exists():  # else a kill came between the two
            output.write(
                rows,
                Provenance(
                    env_id=simulator.env_id,
                    seed=arguments.seed,
                    sources=sources,
                    versions=versions() | simulator.versions,
                    env_kwargs=simulator.kwargs,
                ),
            )
        shutil.rmtree(output.partial)
    print(f"{summary(rows)}{cost}\nwritten to {output.path}; load it as {output.name}")


def check(arguments: Arguments) -> None:
    """Refuse arguments that do not fit each other.

    Raises:
        ValueError: naming the one to change.
    """
    if bool(arguments.policy) == (arguments.online is not None):
        raise ValueError("give either --policy (one or several) or --online sac")
    if not 0 <= arguments.noise < float("inf"):
        raise ValueError(f"--noise {arguments.noise} must not be negative, nor infinite")
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed} must not be negative")
    if arguments.part_steps < 1:
        raise ValueError(f"--part-steps {arguments.part_steps}: at least 1")
    if arguments.online is None:
        if bool(arguments.episodes) == bool(arguments.steps):
            raise ValueError("give either --episodes or --steps: how much of each policy")
        given = arguments.episodes or arguments.steps
        if len(given) not in (1, len(arguments.policy)) or min(given) < 1:
            raise ValueError(
                f"{list(given)} for {len(arguments.policy)} policies: one number for all or one "
                "for each, at least 1"
            )
        if arguments.noise and set(arguments.policy) == {policies.RANDOM}:
            raise ValueError("--noise goes onto a policy's actions; 'random' has none to spoil")
        return
    if arguments.episodes or len(arguments.steps) > 1:
        raise ValueError("--online sac runs for one number of --steps, not for --episodes")
    if arguments.noise or arguments.stochastic:
        raise ValueError("--noise and --stochastic are for --policy; SAC draws its actions anyway")
    if arguments.env is None:
        raise ValueError("--online sac needs --env")


def claimable(output: Output, arguments: Arguments) -> bool:
    """Whether there is something to collect.

    Raises:
        FileExistsError: it is there, or begun, and ``resume`` is off.
    """
    if output.partial.exists():
        if arguments.resume:
            return True
        raise FileExistsError(
            f"{output.partial} holds the beginning of this dataset; pass --resume to go on, or "
            "delete it"
        )
    if output.path.exists():
        if arguments.resume:
            return False
        raise FileExistsError(f"{output.path} exists; delete it or choose another --out")
    if arguments.online is not None and output.run.exists():
        raise FileExistsError(
            f"{output.run} holds the learning curve of another run; delete it or choose another "
            "--out"
        )
    return True


def environment(
    arguments: Arguments, behaviours: Sequence[Behaviour]
) -> tuple[str, dict[str, Any]]:
    """The environment to collect in, and the arguments that the policies saw it with.

    Raises:
        ValueError: none was given, and the policies name none or several.
    """
    trained = [b for b in behaviours if b.env_id is not None]
    env_id = arguments.env
    if env_id is None:
        known = {str(b.env_id) for b in trained}
        if len(known) != 1:
            where = " and ".join(sorted(known)) or "nowhere known"
            raise ValueError(f"pass --env: the policies come from {where}")
        env_id = known.pop()
    seen = [dict(b.env_kwargs) for b in trained if b.env_id == env_id]
    if any(each != seen[0] for each in seen):
        raise ValueError(
            f"the policies saw {env_id} with different arguments, {seen}; collect from each apart"
        )
    return env_id, seen[0] if seen else {}


def amounts_of(arguments: Arguments) -> list[Amount]:
    """How much of each policy."""
    given = arguments.episodes or arguments.steps
    each = given * len(arguments.policy) if len(given) == 1 else given
    if arguments.episodes:
        return [Amount(number, None) for number in each]
    return [Amount(None, number) for number in each]


def rolled_out(
    arguments: Arguments,
    behaviours: list[Behaviour],
    amounts: list[Amount],
    simulator: Simulator,
    parts: Parts,
) -> tuple[list[dict[str, Any]], str]:
    """Collect roll-outs; the sources, and nothing on their cost."""
    by_episodes = amounts[0].episodes is not None
    with progress("episodes" if by_episodes else "steps") as bar:
        tasks = [
            bar.add_task(b.name[-24:], total=a.episodes or a.steps, said="")
            for b, a in zip(behaviours, amounts, strict=True)
        ]

        def say(policy: int, episodes: int, steps: int, mean: float | None) -> None:
            done = episodes if by_episodes else steps
            said = "" if mean is None else f"return {mean:.1f}"
            bar.update(tasks[policy], completed=done, said=said)

        episodes = collect(
            behaviours,
            amounts,
            simulator,
            parts,
            noise=arguments.noise,
            stochastic=arguments.stochastic,
            seed=arguments.seed,
            part_steps=arguments.part_steps,
            say=say,
        )
    sources = [
        {
            "policy": b.name,
            "noise": arguments.noise if b.policy is not None else 0.0,
            "stochastic": arguments.stochastic or b.policy is None,
            "episodes": count,
        }
        for b, count in zip(behaviours, episodes, strict=True)
    ]
    return sources, ""


def trained(
    arguments: Arguments,
    settings: sac.Settings,
    simulator: Simulator,
    parts: Parts,
    output: Output,
) -> tuple[list[dict[str, Any]], str]:
    """Run SAC; the source, and what a step cost."""
    sac_run = Run(
        simulator,
        settings,
        seed=arguments.seed,
        parts=parts,
        partial=output.partial,
        folder=output.run,
        part_steps=arguments.part_steps,
    )
    begun, since = sac_run.steps, time.perf_counter()
    with progress("steps") as bar:
        task = bar.add_task("sac", total=settings.steps, completed=begun, said="")

        def say(steps: int, episodes: int, mean: float) -> None:
            speed = (steps - begun) / (time.perf_counter() - since)
            said = f"episode {episodes}, return {mean:.1f}, {speed:.0f}/s"
            bar.update(task, completed=steps, said=said)

        sac_run.train(say)
    sources = [{"policy": "online SAC run", "episodes": sac_run.episodes, **asdict(settings)}]
    cost = f"; {1000 * sac_run.cpu_seconds / sac_run.steps:.1f} CPU-ms a step"
    return sources, f"{cost}\nlearning curve and policy in {output.run}"


def progress(unit: str) -> Progress:
    """A progress bar on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + "  {task.fields[said]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def summary(rows: Rows) -> str:
    """Number of episodes and steps, quantiles of the returns, share of success."""
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    starts = np.concatenate(([0], ends[:-1] + 1))
    returns = np.add.reduceat(rows["rewards"].astype(np.float64), starts)
    low, middle, high = np.percentile(returns, (0, 50, 100))
    text = (
        f"{len(ends)} episodes, {len(rows['rewards'])} steps; returns {low:.1f} to {high:.1f}, "
        f"median {middle:.1f}"
    )
    if "success" in rows:
        text += f"; success {np.mean(np.logical_or.reduceat(rows['success'], starts)):.0%}"
    return text
