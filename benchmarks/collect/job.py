"""One collection: checked, claimed, collected, written, reported."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict.nn import TensorDictModuleBase

from benchmarks.collect import policy_file, sac
from benchmarks.collect.options import RANDOM, Options, env_arguments
from benchmarks.collect.output import Fields, Output, Parts
from benchmarks.collect.rollout import Behaviour, Simulator, collect_rollouts, sources_of
from benchmarks.runs import PACKAGES, versions
from iwsft.acting import check_keys
from iwsft.checkpoint import CheckpointError, differences
from iwsft.datasets.write import Provenance
from iwsft.environments import modules_to_import
from iwsft.files import alone_in
from iwsft.progress import Progress
from iwsft.trained_policy import FILE, folder_of_run, load_policy

QUANTILES = (0, 25, 50, 75, 90, 95, 98, 100)


def run_job(options: Options) -> None:
    """Collect the dataset of a checked command line, and print a summary.

    What the policies and the environment do not allow is told before the first step.
    """
    # The numbers depend on how many threads there are, and small networks gain nothing from two.
    torch.set_num_threads(1)
    output = Output.of(options.out)
    behaviours = [load_behaviour(name, stochastic=options.stochastic) for name in options.policy]
    arguments = env_arguments(options.env_arg, options.max_episode_steps)
    trusted = options.trust_env_module
    simulator = find_simulator(behaviours, options.env, arguments, trusted=trusted)
    settings = _settings(options, behaviours, simulator)
    if options.resume and output.path.exists():
        check_finished(output, options, behaviours, simulator)
        # A kill while the parts were removed may have left some.
        if output.partial.exists():
            with alone_in(output.partial, wait=False):
                Parts(output.partial, settings)
                shutil.rmtree(output.partial)
        print(f"{output.name} is finished; nothing to do")
        return
    if not (options.resume and output.partial.exists()):
        check_free(output, online=options.online is not None)
    packages = versions(PACKAGES) | simulator.versions
    provenance = Provenance(simulator.env_id, options.seed, (), packages, simulator.kwargs)
    output.rehearse(simulator.first_step(), provenance)
    with alone_in(output.partial, wait=False):
        parts = Parts(output.partial, settings)
        with Progress() as bar:
            if options.online is None:
                cost = ""
                sources = collect_rollouts(behaviours, simulator, parts, options, bar)
            else:
                sources, cost = sac.OnlineRun(simulator, parts, output, options).collect(bar)
        fields = parts.fields()
        output.write(fields, replace(provenance, sources=sources))
        shutil.rmtree(output.partial)
    print(f"{summary(fields, sources)}{cost}\nwritten to {output.path}; load it as {output.name}")


def _settings(
    options: Options, behaviours: Sequence[Behaviour], simulator: Simulator
) -> dict[str, Any]:
    """The values that decide the data; a collection that is continued must agree with them."""
    settings: dict[str, Any] = {"env_id": simulator.env_id, "env_kwargs": simulator.kwargs}
    settings |= {"seed": options.seed, "versions": simulator.versions}
    if options.online is not None:
        # No number depends on where checkpoints are, but a resumed run has them at the same steps.
        return settings | {
            "sac": asdict(sac.settings_of(options)),
            "part_steps": options.part_steps,
        }
    unit = "episodes" if options.episodes else "steps"
    return settings | {
        "policies": [[b.name, b.fingerprint] for b in behaviours],
        "amounts": [{"episodes": None, "steps": None, unit: n} for n in options.amounts],
        "noise": list(options.noises),
        "stochastic": options.stochastic,
    }


def check_finished(
    output: Output, options: Options, behaviours: Sequence[Behaviour], simulator: Simulator
) -> None:
    """Check that a finished dataset is what a command line collects, by what is stored in it."""
    stored, size = output.recorded()
    if options.online is not None:
        sources = [sac.source_of(options, None)]
    else:
        known = options.amounts if options.episodes else [None] * len(behaviours)
        sources = sources_of(behaviours, options, known)
    wanted = {"env_id": simulator.env_id, "env_kwargs": simulator.kwargs, "seed": options.seed}
    made = {name: stored[name] for name in wanted}
    for tree, parts in ((made, stored["sources"]), (wanted, sources)):
        for number, part in enumerate(parts, 1):
            tree[f"source {number}"] = part if options.episodes else {**part, "episodes": None}
    differ = differences(made, wanted)
    least, most = sum(options.amounts), simulator.max_episode_steps
    # The last episode of a policy may go beyond its number of steps.
    if behaviours and options.steps and not least <= size < least + len(behaviours) * most:
        differ = differ or f"steps={size} (now {least})"
    if differ:
        problem = f"{output.path} holds another collection: {differ}"
        raise CheckpointError(f"{problem}; use those settings, delete it, or choose another --out")


def check_free(output: Output, *, online: bool) -> None:
    """Check that no other collection is in the place of a new one."""
    for path, problem in (
        (output.partial, "holds the beginning of this dataset; pass --resume, or delete it"),
        (output.path, "exists; delete it or choose another --out"),
        (output.run, "holds the learning curve of another run; delete it, or change --out"),
    ):
        if path.exists() and (online or path != output.run):
            raise FileExistsError(f"{path} {problem}")


def load_behaviour(name: str, *, stochastic: bool) -> Behaviour:
    """Load a policy of ``--policy`` on the CPU."""
    if name == RANDOM:
        return Behaviour(name, None)
    folder = Path(name).expanduser()
    if (folder / sac.POLICY).is_dir():
        behaviour = Behaviour(name, *sac.load_policy(folder))
    elif (folder_of_run(folder) / FILE).is_file():
        # Modules that the environment names are asked about where it is chosen.
        trained = load_policy(folder, trust_env_module=True)
        behaviour = Behaviour(name, trained.module, trained.env_id, dict(trained.env_kwargs))
    elif folder.suffix == policy_file.SUFFIX:
        # The name alone, so that the data do not depend on where the file is.
        behaviour = Behaviour(folder.name, policy_file.load(folder, stochastic=stochastic))
    elif ":" in name:
        behaviour = Behaviour(name, called(name))
    else:
        ways = f"the folder of a finished run, FILE.npz, MODULE:CALLABLE, or {RANDOM!r}"
        raise ValueError(f"--policy {name}: no policy there; give {ways}")
    assert behaviour.policy is not None
    check_keys(behaviour.policy.cpu(), name=f"--policy {name}")
    return behaviour


def called(name: str) -> TensorDictModuleBase:
    """Return the policy that MODULE:CALLABLE makes."""
    module, _, attribute = name.rpartition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
        if isinstance(function, TensorDictModuleBase):
            raise TypeError("it is a policy, and must be a function that returns one")
        policy = function()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--policy {name}: {error}; MODULE is imported from here or from what is installed, "
            "and CALLABLE is called without arguments"
        ) from error
    if not isinstance(policy, TensorDictModuleBase):
        kind = type(policy).__name__
        raise ValueError(f"--policy {name} gave {kind}; it must return a TensorDictModule")
    return policy


def find_simulator(
    behaviours: Sequence[Behaviour], given: str | None, arguments: dict[str, Any], *, trusted: bool
) -> Simulator:
    """Return the environment that is ``given``, or that of the policies, which must fit it.

    It has the arguments that the policies were trained with there, under those of ``arguments``.
    Modules that the policies' environment names must be ``trusted``.
    """
    known = sorted({b.env_id for b in behaviours if b.env_id is not None})
    who = ", ".join(f"{b.flag} {b.name}" for b in behaviours)
    if given is None and len(known) != 1:
        named = " or ".join(known) or "not known"
        raise ValueError(f"pass --env: the environment of {who} is {named}")
    env_id = known[0] if given is None else given
    seen = [dict(b.env_kwargs) for b in behaviours if b.env_id == env_id]
    if any(kwargs != seen[0] for kwargs in seen):
        raise ValueError(f"the policies saw {env_id} with different arguments, {seen}; split them")
    kwargs = seen[0] if seen else {}
    modules = modules_to_import(env_id if given is None else "", kwargs)
    if modules and not trusted:
        problem = f"the environment {env_id} of {who} imports {', '.join(modules)}"
        raise ValueError(f"{problem}; pass --env, or --trust-env-module if you trust that")
    simulator = Simulator.of(env_id, kwargs | arguments)
    for behaviour in behaviours:
        behaviour.check_sizes(simulator)
    return simulator


def summary(fields: Fields, sources: Sequence[Mapping[str, Any]]) -> str:
    """Return the profile of returns of each source and of all, and the rate of success."""
    ends = np.flatnonzero(fields["terminals"] | fields["timeouts"])
    starts = np.concatenate(([0], ends[:-1] + 1))
    returns = np.add.reduceat(fields["rewards"].astype(np.float64), starts)
    last = np.cumsum([source["episodes"] for source in sources])[:-1]
    parts = zip(sources, np.split(returns, last), strict=True) if len(sources) > 1 else ()
    lines = [f"{source['policy']}: {_profile(part)}" for source, part in parts]
    text = f"{len(ends)} episodes, {len(fields['rewards'])} steps; {_profile(returns)}"
    if "success" in fields:
        text += f"; success {np.mean(np.logical_or.reduceat(fields['success'], starts)):.0%}"
    return "\n".join([*lines, text])


def _profile(returns: NDArray[np.float64]) -> str:
    percents = "/".join(map(str, QUANTILES))
    quantiles = ", ".join(f"{value:.1f}" for value in np.percentile(returns, QUANTILES))
    spread = f"mean {returns.mean():.1f}, deviation {returns.std():.1f}"
    return f"returns: {spread}, quantiles {percents} %: {quantiles}"
