"""Settings of control runs: algorithms, Appendix F and Table 4 as data, and the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from baselines import BASELINES
from benchmarks.options import (
    check_at_least,
    check_device,
    check_known,
    check_once,
    check_seeds,
    check_used,
)
from benchmarks.places import Cluster
from iwsft.curation import Ties
from iwsft.datasets import DEFAULT, OfflineDataset
from iwsft.datasets.catalog import CATALOG, find
from iwsft.training import Schedule
from iwsft.weights import ClipRatio, ImportanceWeights, SelfNormalize, TargetESS

Preset = Literal["paper", "authors"]
Estimator = Literal["steps", "trajectories"]

TOP_10 = (90.0,)
QUALITY_BINS = (90.0, 95.0, 98.0)


@dataclass(frozen=True)
class Algorithm:
    """One of the paper's algorithms."""

    # Percentiles of the return that curate the data; without any, all data are used.
    cuts: tuple[float, ...] = ()
    # Start at the reference policy (fine-tuning), or from scratch (cloning).
    from_reference: bool = False
    # Use importance weights, one per trajectory or one per step; otherwise all are 1.
    weighted: bool = False
    per_step: bool = False

    @property
    def per_trajectory(self) -> bool:
        """Whether each trajectory has one weight."""
        return self.weighted and not self.per_step


# Any share of the data has a name like "bc-10": "bc-5" is behaviour cloning on the top 5 %.
ALGORITHMS: Mapping[str, Algorithm] = {
    "bc": Algorithm(),
    "bc-10": Algorithm(TOP_10),
    "sft": Algorithm(TOP_10, from_reference=True),
    "sft-q": Algorithm(QUALITY_BINS, from_reference=True),
    "iw-sft": Algorithm(TOP_10, from_reference=True, weighted=True),
    "iw-sft-q": Algorithm(QUALITY_BINS, from_reference=True, weighted=True),
    "iw-sft-step": Algorithm(TOP_10, from_reference=True, weighted=True, per_step=True),
}
EVERY_ALGORITHM = (*ALGORITHMS, *BASELINES)
_SHARE = re.compile(r"bc-(\d+(?:\.\d+)?)")


def find_algorithm(name: str) -> Algorithm:
    """The algorithm that has this name; a baseline trains from scratch on all data."""
    share = _SHARE.fullmatch(name)
    if share is None:
        check_known("algorithm", name, [*ALGORITHMS, *BASELINES])
        return ALGORITHMS.get(name, Algorithm())
    if not 0 < float(share[1]) < 100:
        raise ValueError(f"{name}: behaviour cloning on the top 0 % to 100 %, as in bc-10")
    return replace(ALGORITHMS["bc-10"], cuts=(100 - float(share[1]),))


@dataclass(frozen=True)
class FineTuning:
    """A row of Table 4: Adam's rate after the linear warm-up, decay of q, and the weights.

    ``k`` is the temperature of the mean log-ratio (the column k / |tau|). ``normalize`` divides
    weights by their mean over the batch.
    """

    lr: float = 4e-5
    warmup: int = 300
    steps: int = 4500
    alpha: float = 0.995
    k: float = 1.0
    normalize: bool = False

    @property
    def sync_every(self) -> int:
        """Updates between hard syncs at which q is on average as old as the moving average."""
        return max(1, round(2 / (1 - self.alpha)) - 1)


_TABLE_4: dict[str, FineTuning] = {
    "halfcheetah-medium-replay": FineTuning(lr=4e-5, alpha=0.995, k=1.0),
    "hopper-medium-replay": FineTuning(lr=1e-4, alpha=0.99, k=1.0, normalize=True),
    "walker2d-medium-replay": FineTuning(steps=2000, alpha=0.9, k=10.0, normalize=True),
    "halfcheetah-expert": FineTuning(lr=4e-5, alpha=0.995, k=0.8),
    "hopper-expert": FineTuning(lr=4e-4, alpha=0.995, k=0.8),
    "walker2d-expert": FineTuning(lr=4e-5, alpha=0.995, k=0.8),
}
# Batches of single steps, or of whole trajectories.
FINE_TUNING_BATCH: Mapping[Estimator, int] = {"steps": 1024, "trajectories": 256}
CLONING_BATCH: Mapping[Estimator, Mapping[Preset, int]] = {
    "steps": {"paper": 256, "authors": 256},
    "trajectories": {"paper": 32, "authors": 128},
}
CLONING = Schedule(steps=10_000, lr=1e-3, decay="constant")
TIES: Mapping[Preset, Ties] = {"paper": ">", "authors": ">="}


def name_in_tables(data: OfflineDataset) -> str:
    """The name under which tables of settings know a dataset, whatever its file is called.

    It is D4RL's for data of D4RL; others have the family of the environment (``hopper-``) in front.
    """
    entry = find(data.name) or find(Path(data.source).name)
    if entry is not None and entry.env_id == data.env_id:
        return entry.name
    families = {_kind_of(entry.env_id): entry.name.split("-")[0] for entry in CATALOG.values()}
    kind = _kind_of(data.env_id or "")
    family = families.get(kind, kind.lower())
    return data.name if data.name.split("-")[0] == family else f"{family}-{data.name}"


def _kind_of(env_id: str) -> str:
    """The part of an id that tasks of one family share: AntMaze of AntMaze_UMaze-v4."""
    return re.sub(r"-v\d+$", "", env_id.rpartition(":")[2]).split("_")[0]


def find_fine_tuning(dataset: str, algorithm: Algorithm) -> tuple[FineTuning, str]:
    """The row of Table 4 for a dataset, and its source in words.

    Another dataset takes the row of its environment and kind: ``expert`` where the name says so,
    medium-replay otherwise. Unweighted runs use the learning rate of the paper's SFT(Q).
    """
    kind = "expert" if "expert" in dataset else "medium-replay"
    name = f"{dataset.split('-')[0]}-{kind}"
    if name not in _TABLE_4:
        return FineTuning(), f"{dataset} is not in the paper: the row of halfcheetah-medium-replay"
    if not algorithm.weighted:
        return FineTuning(lr=4e-4 if name == "hopper-expert" else 4e-5), "SFT(Q) of Appendix F"
    return _TABLE_4[name], f"Table 4, {name}"


def choose_weights(
    preset: Preset, row: FineTuning, *, per_step: bool = False, target_ess: float | None = None
) -> ImportanceWeights:
    """The transforms of a preset; ``target_ess`` uses :class:`TargetESS` instead of k."""
    if per_step:
        # Ratio clips of the per-step variant: 1 -+ 0.8 (paper, 3.4), [0, 2] (authors' control).
        clip = ClipRatio(0.2, 1.8) if preset == "paper" else ClipRatio(0.0, 2.0)
        return ImportanceWeights(step=(clip,), reduce=None)
    if target_ess is not None:
        return ImportanceWeights(trajectory=(TargetESS(target_ess), SelfNormalize()))
    if preset == "authors":
        return ImportanceWeights.authors_control(row.k, row.normalize)
    chain = ImportanceWeights.paper_control(row.k)
    return replace(chain, trajectory=(SelfNormalize(),)) if row.normalize else chain


@dataclass(frozen=True)
class Suite:
    """A table of the paper: every algorithm on every dataset with every seed, as in ``Options``."""

    algo: tuple[str, ...]
    dataset: tuple[str, ...]
    seeds: tuple[int, ...]
    pretrain_dataset: str | None = None
    top: float | None = None
    # How cuts treat equal returns, by dataset, where the preset's way would keep nothing.
    ties: Mapping[str, Ties] = field(default_factory=dict)
    # Further datasets, each for behaviour cloning on all of it alone.
    cloned: tuple[str, ...] = ()


_ROBOTS = ("halfcheetah", "hopper", "walker2d")
# Without --suite.
SINGLE = Suite(("iw-sft-q",), (DEFAULT,), (0,))
SUITES: Mapping[str, Suite] = {
    # Tables 2 and 5. Returns of AntMaze are 0 or 1, and most are 1: ">" would keep nothing, ">="
    # keeps those that reach the goal.
    "paper": Suite(
        EVERY_ALGORITHM,
        (
            *(f"{robot}-medium-replay-v2" for robot in _ROBOTS),
            *(f"{robot}-medium-expert-v2" for robot in _ROBOTS),
            "antmaze-umaze-v0",
        ),
        seeds=(0, 1, 2, 3, 4),
        ties={"antmaze-umaze-v0": ">="},
    ),
    "locomotion": Suite(
        EVERY_ALGORITHM,
        tuple(
            f"{robot}-{kind}-v2"
            for kind in ("medium-replay", "medium-expert", "medium", "expert", "random")
            for robot in _ROBOTS
        ),
        seeds=(0, 1, 2, 3, 4),
    ),
    # Table 3, three runs of each. Fine-tuning is on the top 5 % of complete and the top 5 % of
    # mixed as one set. "BC (5%)" is "bc-5"; "BC (all data)" is "bc" on all of partial, and on all
    # of complete (section 4.3).
    "kitchen": Suite(
        ("bc-5", "sft", "sft-q", "iw-sft-q"),
        ("kitchen-complete-v0+kitchen-mixed-v0",),
        seeds=(0, 1, 2),
        pretrain_dataset="kitchen-partial-v0",
        top=5.0,
        cloned=("kitchen-partial-v0", "kitchen-complete-v0"),
    ),
}


@dataclass(frozen=True)
class Options:
    """Train and score algorithms on datasets, several seeds over the cores or a cluster."""

    suite: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME",
            help=f"A table of the paper: {', '.join(SUITES)}. It sets --algo, --dataset, "
            "--seeds, --pretrain-dataset and --top where you do not, leaves out what the data do "
            "not allow, and ends in the report.",
        ),
    ] = None
    # Names are checked by us: tyro would not say which one is near.
    algo: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="NAME [NAME ...]",
            help=f"One or several of {', '.join(EVERY_ALGORITHM)}; bc-5 and the like for "
            f"another share. By default {' '.join(SINGLE.algo)}.",
        ),
    ] = None
    dataset: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME|FILE [...]")] = None
    """One or several: bundled or D4RL name, Minari id, or an HDF5 file in D4RL's layout. A+B joins
    two, each cut by its own returns. By default hopper-replay-mini."""
    seeds: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT [INT ...]")] = None
    """Seeds of initialisation, batches and evaluation; one run each. By default 0."""
    pretrain_dataset: str | None = None
    """Clone the reference policy on these data and fine-tune it on --dataset (Table 3)."""
    top: float | None = None
    """Fine-tune on the top TOP % of the data instead of 10; the finer bins of sft-q and iw-sft-q
    shrink with it."""
    steps: int | None = None
    """Updates of the run; by default the published number (Table 4, or the baseline's own)."""
    baseline_steps: int | None = None
    """Updates of awac, iql, td3-bc, cql and dt, instead of --steps."""
    reference_steps: int = CLONING.steps
    """Updates of behaviour cloning for the reference policy."""
    eval_episodes: int = 100
    """Episodes of the final score."""
    curve_episodes: int = 10
    """Episodes of each of the ten points of the learning curve; 0 draws no curve."""
    preset: Preset = "paper"
    """The reading of weights and cuts: the paper's text, or its authors' code."""
    estimator: Estimator = "steps"
    """Batches of single steps with cached weights (q synced hard), or the paper's batches of whole
    trajectories (q a moving average): the same expected loss at a hundredth of the cost."""
    temperature: float | None = None
    """Factor k of the weights, instead of Table 4's."""
    target_ess: float | None = None
    """Choose the temperature at each batch (or sync) for this effective sample size, in (0, 1]."""
    alpha: float | None = None
    """Decay of q, the policy's moving average, instead of Table 4's; hard syncs of q come as often
    as keeps its mean age."""
    ties: Ties | None = None
    """How cuts treat equal returns, instead of the preset's ">" (paper) or ">=" (authors): "rank"
    keeps the stated share, ties in random order, which sparse 0/1 returns need."""
    video: bool = False
    """Record the first episode of the final score as video.mp4 in the run's folder."""
    trust_env_module: bool = False
    """Import the module that a dataset's env_id or wrappers name. Its code can do anything."""
    device: str = "cpu"
    """Device of the networks and the data."""
    jobs: int | None = None
    """Number of runs at a time; by default one per core."""
    cluster: Cluster | None = None
    """Run on a Ray cluster: the one that RAY_ADDRESS names, one that runs on this machine, or a new
    one of this machine's cores. Its nodes share --out, the data and the project."""
    out: Path = Path("runs")
    """Folder of all runs: OUT/d4rl/DATASET/ALGO/seed-K/."""
    variant: str = ""
    """Name of these settings in tables and reports: the runs go to OUT/VARIANT/d4rl/..., and share
    the reference policies of OUT."""
    resume: bool = False
    """Continue runs that were cut off; finished ones are kept."""


def choose_suite(options: Options) -> Suite:
    """The suite of a command line, changed by the options that are given."""
    suite = SINGLE
    if options.suite is not None:
        check_known("suite", options.suite, list(SUITES))
        suite = SUITES[options.suite]
    names = ("algo", "dataset", "seeds", "pretrain_dataset", "top")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    # The further datasets belong to the table's own rows.
    changed: dict[str, Any] = given | ({"cloned": ()} if given.keys() - {"seeds", "top"} else {})
    return replace(suite, **changed)


def check_options(options: Options, suite: Suite) -> None:
    """Check everything that takes no data; ``suite`` is that of :func:`choose_suite`."""
    algorithms = [find_algorithm(name) for name in suite.algo]
    check_once(algo=suite.algo, dataset=suite.dataset)
    check_seeds(suite.seeds)
    counts = ("steps", "baseline_steps", "reference_steps", "eval_episodes", "jobs")
    check_at_least(1, **{name: getattr(options, name) for name in counts})
    check_at_least(0, curve_episodes=options.curve_episodes)
    alpha, top, k, ess = options.alpha, options.top, options.temperature, options.target_ess
    if k is not None and not 0 <= k < math.inf:
        raise ValueError(f"--temperature {k}: a finite number that is not negative")
    if ess is not None and not 0 < ess <= 1:
        raise ValueError(f"--target-ess {ess}: a share of the batch, above 0 and at most 1")
    if alpha is not None and not 0 <= alpha < 1:
        raise ValueError(f"--alpha {alpha}: a decay lies in [0, 1)")
    if top is not None and not 0 < top <= 100:
        raise ValueError(f"--top {top}: a share of the data in %, above 0 and at most 100")
    if options.variant in (".", "..", "d4rl") or set(options.variant) & set("/\\"):
        raise ValueError(f"--variant {options.variant}: a name of a folder, without slashes")
    per_trajectory = any(algorithm.per_trajectory for algorithm in algorithms)
    tuned = any(algorithm.from_reference for algorithm in algorithms)
    chosen = f"in {', '.join(suite.algo)}"
    baselines = not set(BASELINES).isdisjoint(suite.algo)
    for name, used, where in (
        ("target_ess", per_trajectory, chosen),
        ("temperature", per_trajectory, chosen),
        ("temperature", options.target_ess is None, f"with --target-ess {options.target_ess}"),
        ("alpha", any(algorithm.weighted for algorithm in algorithms), chosen),
        ("ties", any(algorithm.cuts for algorithm in algorithms), chosen),
        ("top", tuned, chosen),
        ("pretrain_dataset", tuned, chosen),
        ("baseline_steps", baselines, f"without one of {', '.join(BASELINES)}"),
    ):
        check_used(name, getattr(options, name), used, where)
    check_device(options.device)
