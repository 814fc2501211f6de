"""The weights of a run of control: q from its checkpoint, against its reference policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrl.modules import ProbabilisticActor

from benchmarks.d4rl import options as d4rl
from benchmarks.d4rl.run import Run, Task, sizes
from benchmarks.d4rl.settings import name_in_tables
from benchmarks.d4rl.train import make_policy, reference_folder
from benchmarks.options import parse
from benchmarks.runs import CONFIG
from benchmarks.weights.options import Options
from benchmarks.weights.source import Source, chain_of, notes_of
from iwsft import checkpoint
from iwsft.forward_pass import ForwardPass
from iwsft.objective import ImportanceWeightedMLE
from iwsft.reference import annotate_reference

# Names of a policy's parameters in the checkpoint of a loss: of a q that follows, of the policy.
_LAGGED, _POLICY = "target_actor_network_params.", "actor_network_params."


def of_run(options: Options, folder: Path, config: dict[str, Any], out: Path) -> Source:
    """Weigh the curated data of a run, or of another dataset, by its checkpoint.

    q is the moving average of the policy where the run has one. Otherwise it is the policy itself,
    as a sync at this moment would take it.
    """
    name = str(config["algo"])
    if not d4rl.find_algorithm(name).from_reference:
        raise ValueError(f"{name} starts from no reference policy, so it has no importance weights")
    given = parse(d4rl.Options, "d4rl", None, words=["--config", str(folder / CONFIG)])
    (source,), trusted = given.dataset or ("",), given.trust_env_module
    task = Task.load(source, given.pretrain_dataset, trust=trusted)
    recorded = config.get("settings", {})
    for key, data_of in (("data", task.dataset), ("pretrain", task.pretrain)):
        if recorded.get(key, data_of.fingerprint) != data_of.fingerprint:
            problem = f"{data_of.source} has changed since {folder} was trained"
            raise ValueError(f"{problem}, so its weights would be others; put it back")
    given = replace(given, out=out, device="cpu")
    dataset, seed = d4rl.name_of(source, given.pretrain_dataset), int(config["seed"])
    run = Run(dataset, name, seed, given, source, name_in_tables(task.dataset))
    home = reference_folder(run, task)
    q, what = _read_policy(folder, run, task, f"{folder} has no checkpoint yet")
    reference, _ = _read_policy(home, run, task, f"{home} has no reference policy any more")
    chosen = task if options.data is None else Task.load(options.data, trust=trusted)
    theirs, ours = (sizes(each.dataset.trajectories) for each in (chosen, task))
    if theirs != ours:
        raise ValueError(
            f"--data {options.data} has observations and actions of sizes {theirs}, the policies "
            f"of the run read {ours}; pass data of the same robot"
        )
    weighted = run.algorithm.weighted or run.algorithm.related is not None
    chain, note = chain_of(name, run.weights, weighted=weighted)
    data = run.curate(chosen.dataset.trajectories, chosen.parts)
    rows = f"the curated part of {chosen.dataset.name}"
    notes = notes_of(what, f"the policy cloned on {task.pretrain.name}", rows, data)
    annotate_reference(reference, data)
    return Source(
        name=f"{chosen.dataset.name}, {name}, seed {run.seed}",
        notes=notes + note,
        chain=chain,
        make_loss=lambda chain: ImportanceWeightedMLE(
            q, importance_weights=chain, proposal="current", functional=False
        ),
        trajectories=data,
        log_q=ForwardPass(q, data).log_prob(),
    )


def _read_policy(
    folder: Path, run: Run, task: Task, problem: str
) -> tuple[ProbabilisticActor, str]:
    """Read a policy from the checkpoint of its training, and say what it is in words."""
    path, way_out = folder / checkpoint.FOLDER / checkpoint.FILE, "run that seed again"
    if not path.is_file():
        raise FileNotFoundError(f"{problem} (no {path}); {way_out}, or continue it with --resume")
    state = checkpoint.read(path, way_out)["state"]
    parameters = state["loss"]
    lagged = any(name.startswith(_LAGGED) for name in parameters)
    prefix, average = (_LAGGED, "the moving average of ") if lagged else (_POLICY, "")
    policy = make_policy(run, task.dataset.trajectories)
    own = {n.removeprefix(prefix): x for n, x in parameters.items() if n.startswith(prefix)}
    policy.load_state_dict(own)
    return policy, f"{average}the policy after {state['step']:,} updates"
