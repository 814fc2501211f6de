"""The command line of control: its algorithms, its suites, its options and their checks."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from baselines import BASELINES
from benchmarks.device import check_device
from benchmarks.options import (
    check_at_least,
    check_file,
    check_known,
    check_once,
    check_seeds,
    check_trackers,
    check_used,
    option,
)
from benchmarks.runs import folder_of
from iwsft.files import HDF5_SUFFIXES

Preset = Literal["paper", "authors"]
Estimator = Literal["steps", "trajectories"]
Ties = Literal["rank", ">", ">="]
_FORMS = "gaussian|mixture"
# Between the names of two datasets, of which the first is that of the reference policy.
TO = "--to--"

# Updates of behaviour cloning (Appendix F).
REFERENCE_STEPS = 10_000

TOP_10 = (90.0,)
QUALITY_BINS = (90.0, 95.0, 98.0)


@dataclass(frozen=True)
class Algorithm:
    """One of the paper's algorithms, or of a related method that starts at the reference policy."""

    # Percentiles of the return that curate the data; without any, all data are used.
    cuts: tuple[float, ...] = ()
    # Start at the reference policy (fine-tuning), or from scratch (cloning).
    from_reference: bool = False
    # Use importance weights, one per trajectory or one per step; otherwise all are 1.
    weighted: bool = False
    per_step: bool = False
    # Preset of iwsft.ImportanceWeights, in place of the paper's weights.
    related: str | None = None

    @property
    def per_trajectory(self) -> bool:
        """Whether each trajectory has one weight."""
        return self.weighted and not self.per_step

    @property
    def signed(self) -> bool:
        """Whether all data have data weights, negative where the return is low."""
        return self.related == "topr"

    @property
    def syncs(self) -> bool:
        """Whether weights are computed from the policy of an earlier update."""
        return self.weighted and not self.signed


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
RELATED: Mapping[str, Algorithm] = {
    "psft": Algorithm(TOP_10, True, weighted=True, per_step=True, related="psft"),
    "minor-sft": Algorithm(TOP_10, True, weighted=True, related="minor_sft"),
    "topr": Algorithm((), True, weighted=True, per_step=True, related="topr"),
}
EVERY_ALGORITHM = (*ALGORITHMS, *BASELINES)
_SHARE = re.compile(r"bc-(\d+(?:\.\d+)?)")


def find_algorithm(name: str) -> Algorithm:
    """The algorithm that has this name; a baseline trains from scratch on all data."""
    share = _SHARE.fullmatch(name)
    if share is None:
        check_known("algorithm", name, [*ALGORITHMS, *RELATED, *BASELINES])
        return {**ALGORITHMS, **RELATED}.get(name, Algorithm())
    if not 0 < float(share[1]) < 100:
        raise ValueError(f"{name}: behaviour cloning on the top 0 % to 100 %, as in bc-10")
    return replace(ALGORITHMS["bc-10"], cuts=(100 - float(share[1]),))


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
SINGLE = Suite(("iw-sft-q",), ("hopper-replay-mini",), (0,))
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
class Experiment:
    """What to run: every algorithm on every dataset with every seed."""

    suite: Annotated[str | None, option("NAME", "none")] = None
    """Table of the paper: paper, locomotion or kitchen. It sets --algo, --dataset, --seeds,
    --pretrain-dataset and --top where you do not, leaves out what the data do not allow, and ends
    in the report."""
    # Names are checked by us: tyro would not say which one is near.
    algo: Annotated[
        tuple[str, ...] | None,
        option(
            "NAME [NAME ...]",
            " ".join(SINGLE.algo),
            help=f"One or several of {', '.join((*EVERY_ALGORITHM, *RELATED))}; bc-5 and the like "
            "for another share.",
        ),
    ] = None
    dataset: Annotated[
        tuple[str, ...] | None, option("NAME|FILE [...]", " ".join(SINGLE.dataset))
    ] = None
    """One or several: bundled name, D4RL name, name of "collect sets", Minari id, or HDF5 file
    in D4RL's layout. A+B joins two, each cut by its own returns."""
    seeds: Annotated[tuple[int, ...] | None, option("INT [INT ...]", "0")] = None
    """Seeds of initialisation, batches and evaluation; one run each."""
    pretrain_dataset: Annotated[str | None, option("NAME|FILE", "that of --dataset")] = None
    """Dataset that the reference policy is cloned on; fine-tuning is on --dataset (Table 3)."""
    trust_env_module: bool = False
    """Import the module that a dataset's env_id or wrappers name. Its code can do anything."""


@dataclass(frozen=True)
class Training:
    """How to train. Table 4 of the paper has a row for each dataset."""

    preset: Preset = "paper"
    """Reading of weights and cuts: the paper's text, or its authors' code."""
    settings_of: Annotated[
        str | None, option("NAME", "that of --dataset, or its environment's")
    ] = None
    """D4RL dataset whose published settings to take, such as hopper-medium-expert-v2 for a file of
    yours."""
    estimator: Estimator = "steps"
    """Batches of single steps with cached weights (q synced hard), or the paper's batches of whole
    trajectories (q a moving average): the same expected loss at a small part of the cost."""
    steps: Annotated[
        int | None,
        option("INT", "Table 4, or the baseline's own number", aliases=("--max-steps",)),
    ] = None
    """Updates of the run."""
    baseline_steps: Annotated[int | None, option("INT", "that of --steps")] = None
    """Updates of awac, iql, td3-bc, rebrac, cql and dt."""
    policy: Annotated[Literal["gaussian", "mixture"] | None, option(_FORMS, "gaussian")] = None
    """Form of the policy: one Gaussian, or a mixture of five. Baselines have their own."""
    reference_steps: int = REFERENCE_STEPS
    """Updates of behaviour cloning for the reference policy."""
    top: Annotated[float | None, option("PERCENT", "10, or that of the suite")] = None
    """Share of the data to fine-tune on, in %; the finer bins of sft-q and iw-sft-q shrink with
    it."""
    ties: Annotated[Ties | None, option("rank|>|>=", '">" of paper, ">=" of authors')] = None
    """How cuts treat equal returns. "rank" keeps the stated share, ties in random order, which
    sparse 0/1 returns need."""


@dataclass(frozen=True)
class Weighting:
    """How importance weights are computed, in algorithms that have them."""

    q: Annotated[Literal["auto"] | None, option("auto", "none, k is fixed")] = None
    """Let the returns of the data choose the temperature, at each batch or sync; the same setting
    for all tasks."""
    temperature: Annotated[float | None, option("FLOAT", "Table 4")] = None
    """Factor k of the mean log-ratio."""
    target_ess: Annotated[float | None, option("FLOAT", "none, k is fixed")] = None
    """Effective sample size in (0, 1] that the temperature is chosen for, at each batch or sync."""
    alpha: Annotated[float | None, option("FLOAT", "Table 4")] = None
    """Decay of q, the policy's moving average; hard syncs of q come as often as keeps its mean
    age."""


@dataclass(frozen=True)
class Scoring:
    """How policies are scored."""

    eval_episodes: int = 100
    """Episodes of the final score."""
    curve_episodes: int = 10
    """Episodes of each of the ten points of the learning curve; 0 draws no curve."""
    report_to: Annotated[tuple[str, ...], option("NAME [NAME ...]", "none")] = ()
    """Send the metrics of each run to tensorboard, wandb or trackio, too."""
    video: bool = False
    """Record the first episode of the final score as video.mp4 in the run's folder."""


@dataclass(frozen=True)
class Machine:
    """Where to run."""

    device: str = "cpu"
    """Device of the networks and the data."""
    graph: bool = False
    """Capture an update as a CUDA graph, with --device cuda."""
    stack_seeds: bool = False
    """Train the seeds of an algorithm at once, as one stacked batch of networks in one process.
    Each leaves the files of a run of its own; its cpu_seconds are a share."""
    jobs: Annotated[int | None, option("INT", "one per core")] = None
    """Number of runs at a time."""
    cluster: Annotated[Literal["ray"] | None, option("ray", "none")] = None
    """Cluster to run on: the Ray cluster that RAY_ADDRESS names, one that runs on this machine, or
    a new one of this machine's cores. Its nodes share --out, the data and the project."""


@dataclass(frozen=True)
class Output:
    """Where results go."""

    out: Path = Path("runs")
    """Folder of all runs: OUT/d4rl/DATASET/ALGO/seed-K/."""
    variant: Annotated[str, option("NAME", "none")] = ""
    """Name of these settings in tables and reports. The runs go to OUT/VARIANT/d4rl/..., and share
    the reference policies of OUT."""
    resume: bool = False
    """Continue runs that were cut off; finished ones are kept."""


@dataclass(frozen=True)
class Options(Experiment, Training, Weighting, Scoring, Machine, Output):
    """Train and score algorithms on datasets, several seeds over the cores or a cluster."""


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
    for name in suite.algo:
        find_algorithm(name)
    check_once(algo=suite.algo, dataset=suite.dataset)
    for source in (*suite.dataset, *suite.cloned, suite.pretrain_dataset or ""):
        for part in parts_of(source):
            check_file(part)
    check_seeds(suite.seeds)
    if options.settings_of is not None:
        from iwsft.datasets.catalog import CATALOG

        kind, place = "dataset of D4RL for --settings-of", "iwsft.datasets.available()"
        check_known(kind, options.settings_of, [*CATALOG], place)
    counts = ("steps", "baseline_steps", "reference_steps", "eval_episodes", "jobs")
    check_at_least(1, **{name: getattr(options, name) for name in counts})
    check_at_least(0, curve_episodes=options.curve_episodes)
    check_trackers(options.report_to)
    alpha, top, k, ess = options.alpha, options.top, options.temperature, options.target_ess
    if k is not None and not 0 <= k < math.inf:
        raise ValueError(f"--temperature {k}: a finite number that is not negative")
    if k == 0 and "minor-sft" in suite.algo:
        raise ValueError("--temperature 0: minor-sft needs one above 0; sft is its limit at 0")
    if ess is not None and not 0 < ess <= 1:
        raise ValueError(f"--target-ess {ess}: a share of the batch, above 0 and at most 1")
    if alpha is not None and not 0 <= alpha < 1:
        raise ValueError(f"--alpha {alpha}: a decay lies in [0, 1)")
    if top is not None and not 0 < top <= 100:
        raise ValueError(f"--top {top}: a share of the data in %, above 0 and at most 100")
    if options.variant in (".", "..", "d4rl") or set(options.variant) & set("/\\"):
        raise ValueError(f"--variant {options.variant}: a name of a folder, without slashes")
    for name, where in without_effect(options, suite.algo):
        check_used(name, getattr(options, name), False, where)
    check_device(options.device)
    if options.graph and not options.device.startswith("cuda"):
        raise ValueError(f"--graph needs a GPU, and --device is {options.device}")
    for name in ("graph", "stack_seeds"):
        if getattr(options, name):
            _check_shapes(f"--{name.replace('_', '-')}", options, suite.algo)


def parts_of(source: str) -> list[str]:
    """The datasets that ``A+B`` joins; a file may have such a name."""
    return [source] if Path(source).expanduser().exists() else source.split("+")


def check_names(suite: Suite) -> None:
    """Check that the datasets are known, which imports torch, and not yet all of a job."""
    from iwsft.datasets import check_name

    for source in filter(None, (*suite.dataset, suite.pretrain_dataset)):
        for part in parts_of(source):
            check_name(part)


def name_of(source: str, pretrain_source: str | None = None) -> str:
    """Name of the folders of the runs on data: that of the dataset, known before it is loaded."""
    names = [
        Path(part).stem
        if part.lower().endswith(HDF5_SUFFIXES)
        else part.removeprefix("minari:").replace("/", "-")
        for part in parts_of(source)
    ]
    before = "" if pretrain_source is None else name_of(pretrain_source) + TO
    return before + "+".join(names)


def folders(options: Options, suite: Suite) -> Iterator[Path]:
    """Folders of all runs of a command line."""
    rows = [(name_of(each, suite.pretrain_dataset), suite.algo) for each in suite.dataset]
    rows += [(name_of(each), ("bc",)) for each in suite.cloned]
    root = options.out / options.variant
    for (name, algos), seed in itertools.product(rows, suite.seeds):
        yield from (folder_of(root, "d4rl", name, algo, seed) for algo in algos)


def _check_shapes(option: str, options: Options, algo: Sequence[str]) -> None:
    """Check that all batches of an algorithm have the same shape, which ``option`` needs."""
    if options.estimator == "trajectories" and not set(BASELINES).issuperset(algo):
        raise ValueError(f"{option} needs batches of one shape: --estimator steps")
    if "dt" in algo:
        raise ValueError(f"{option} is not for dt, whose batches are windows; run it without")


def without_effect(options: Options, algo: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options that change nothing in these algorithms, each with where it is so."""
    algorithms = [find_algorithm(name) for name in algo]
    per_trajectory = any(algorithm.per_trajectory for algorithm in algorithms)
    chosen_q = any(each.per_trajectory and each.related is None for each in algorithms)
    tuned = any(algorithm.from_reference and algorithm.cuts for algorithm in algorithms)
    baselines = not set(BASELINES).isdisjoint(algo)
    chosen = f"in {', '.join(algo)}"
    for name, used, where in (
        ("q", chosen_q, chosen),
        ("target_ess", chosen_q, chosen),
        ("target_ess", options.q is None, f"with --q {options.q}"),
        ("temperature", per_trajectory, chosen),
        ("temperature", options.q is None, f"with --q {options.q}"),
        ("temperature", options.target_ess is None, f"with --target-ess {options.target_ess}"),
        ("alpha", any(algorithm.syncs for algorithm in algorithms), chosen),
        ("ties", any(algorithm.cuts for algorithm in algorithms), chosen),
        ("top", tuned, chosen),
        ("pretrain_dataset", any(each.from_reference for each in algorithms), chosen),
        ("settings_of", baselines or any(each.from_reference for each in algorithms), chosen),
        ("policy", not set(BASELINES).issuperset(algo), chosen),
        ("baseline_steps", baselines, f"without one of {', '.join(BASELINES)}"),
    ):
        if not used:
            yield name, where
