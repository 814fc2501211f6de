"""Several runs at once: checked and claimed before, reported on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from baselines import BASELINES
from benchmarks import places
from benchmarks.d4rl import suites
from benchmarks.d4rl.arguments import Arguments, chosen
from benchmarks.d4rl.checks import check_data, check_settings
from benchmarks.d4rl.plan import Plan, claim
from benchmarks.d4rl.run import run
from benchmarks.d4rl.task import Task
from benchmarks.options import check_at_least, check_once, check_seeds, check_used
from benchmarks.report.tables import score_table
from benchmarks.results import CONTROL, read_runs
from benchmarks.runs import EXPECTED, one_line, tell
from benchmarks.sweep import Summary, run_all
from iwsft.training import Row

_HEADER = f"{'algo':<12} {'seed':>4}  {'stage':<9} {'step':>13} {'loss':>8} {'ESS':>5} {'score':>7}"
_COLUMN = "dataset"
# The longest runs start first, so that none is left running alone at the end.
_SLOWEST_FIRST = ("cql", "dt", "iql", "awac", "td3-bc")


@dataclass(frozen=True)
class Job:
    """A claimed run, and the name of its dataset where the sweep has several."""

    plan: Plan
    dataset: str
    width: int

    def __str__(self) -> str:
        return f"{self.dataset} {self.plan}" if self.width else str(self.plan)

    @property
    def column(self) -> str:
        """What stands in front of the job's lines."""
        return f"{self.dataset:<{self.width}} " if self.width else ""


def sweep(arguments: Arguments) -> Summary:
    """Run what the command line asks for; print scores, summary and, of a suite, the report's page.

    Everything that can be known before is checked before any folder is claimed. A run that fails
    is reported, and the others go on. A suite goes on without what its data do not allow.

    Raises:
        ValueError: and others of ``EXPECTED``, naming what is wrong and the way out.
    """
    suite = chosen(arguments)
    plans = _plans(arguments, suite)
    _check(arguments, suite, plans)
    if arguments.ties is None:
        for dataset in plans.keys() & suite.ties.keys():
            plans[dataset] = [
                replace(plan, ties=suite.ties[dataset]) if plan.cuts else plan
                for plan in plans[dataset]
            ]
    summary = Summary()
    with places.place(
        arguments.cluster,
        items=sum(map(len, plans.values())),
        jobs=arguments.jobs,
        device=arguments.device,
        out=arguments.out.absolute(),
        files=[file for name in suite.sources if (file := _file(name)) is not None],
    ) as place:
        ready, names = _claimed(arguments, plans, summary)
        _run(_in_order(ready, several=len(names) > 1), place, summary)
    finished = [run for run in read_runs(arguments.out, CONTROL) if run.dataset in names]
    console = Console()
    if finished:
        console.print(score_table(finished))
    console.print(str(summary), highlight=False, markup=False, soft_wrap=True)
    if arguments.suite is not None and finished:
        # Draws figures; what it imports takes seconds.
        from benchmarks.report.page import write_report

        page = write_report(arguments.out, arguments.out / "report")
        console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    return summary


def _plans(arguments: Arguments, suite: suites.Suite) -> dict[str, list[Plan]]:
    """The runs on each dataset."""

    def path(name: str) -> str:
        # Workers on a cluster have a working directory of their own.
        file = _file(name)
        return name if arguments.cluster is None or file is None else str(file)

    out = arguments.out if arguments.cluster is None else arguments.out.absolute()
    before = suite.pretrain_dataset
    shorter = arguments.baseline_steps if arguments.baseline_steps is not None else arguments.steps

    def plan(dataset: str, algo: str, seed: int) -> Plan:
        return Plan(
            algo=algo,
            dataset=path(dataset),
            seed=seed,
            preset=arguments.preset,
            estimator=arguments.estimator,
            steps=shorter if algo in BASELINES else arguments.steps,
            reference_steps=arguments.reference_steps,
            temperature=arguments.temperature,
            target_ess=arguments.target_ess,
            eval_episodes=arguments.eval_episodes,
            device=arguments.device,
            out=str(out),
            resume=arguments.resume,
            ties=arguments.ties,
            pretrain_dataset=None if before is None else path(before),
            top=suite.top,
            alpha=arguments.alpha,
            variant=arguments.variant,
            curve_episodes=arguments.curve_episodes,
        )

    return {
        dataset: [plan(dataset, algo, seed) for algo in suite.algorithms for seed in suite.seeds]
        for dataset in suite.datasets
    }


def _file(name: str) -> Path | None:
    """The path of a dataset that is a file here, not a name."""
    path = Path(name).expanduser()
    return path.absolute() if path.suffix and path.is_file() else None


def _check(arguments: Arguments, suite: suites.Suite, plans: Mapping[str, Sequence[Plan]]) -> None:
    """Check what the command line asks for; takes no data.

    Raises:
        ValueError: naming the setting, its value and the way out.
    """
    if not plans:
        raise ValueError("nothing to run: pass at least one name to --dataset")
    check_once(algo=suite.algorithms, dataset=suite.datasets)
    check_seeds(suite.seeds)
    # The same runs on each dataset, and only what the command line itself sets.
    runs = [
        replace(
            plan,
            steps=arguments.steps,
            top=arguments.top,
            pretrain_dataset=arguments.pretrain_dataset,
        )
        for plan in next(iter(plans.values()))
    ]
    check_settings(runs)
    steps = arguments.baseline_steps
    check_at_least(1, baseline_steps=steps, jobs=arguments.jobs)
    used = any(plan.algo in BASELINES for plan in runs)
    check_used("baseline_steps", steps, used, f"without one of {', '.join(BASELINES)}")


def _claimed(
    arguments: Arguments, plans: Mapping[str, Sequence[Plan]], summary: Summary
) -> tuple[list[tuple[Plan, str]], list[str]]:
    """Check the data and claim all runs, or none; the unfinished ones, and all datasets' names.

    With ``--suite``, what the data do not allow is left out and told.
    """
    todo: list[tuple[Plan, str]] = []
    names: list[str] = []
    new: list[Path] = []
    try:
        for dataset, asked in plans.items():
            task = _loaded(dataset, asked[0], summary, lenient=arguments.suite is not None)
            if task is None:
                continue
            if task.name in names:
                raise ValueError(f"{dataset}: there is another dataset of the name {task.name}")
            fit = _fitting(dataset, asked, task, summary, lenient=arguments.suite is not None)
            if not fit:
                continue
            names.append(task.name)
            configs = [plan.folder(task) / "config.json" for plan in fit]
            free = [path for path in configs if not path.exists()]
            unfinished = claim(fit, task)
            new += free
            todo += [(plan, task.name) for plan in unfinished]
            summary.finished_before += len(fit) - len(unfinished)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    if not names:
        raise ValueError("nothing to run is left: " + "; ".join(summary.left_out))
    return todo, names


def _loaded(dataset: str, plan: Plan, summary: Summary, *, lenient: bool) -> Task | None:
    try:
        return Task.load(plan.dataset, plan.pretrain_dataset)
    # No network, no file, no package. A name or contents that are wrong are the user's to mend.
    except (OSError, ImportError) as error:
        if not lenient:
            raise
        summary.leave_out(f"{dataset}: {one_line(error)}")
        return None


def _fitting(
    dataset: str, plans: Sequence[Plan], task: Task, summary: Summary, *, lenient: bool
) -> list[Plan]:
    """The runs that the data allow."""
    try:
        check_data(plans, task)
        return list(plans)
    except EXPECTED:
        if not lenient:
            raise
    fit: list[Plan] = []
    reasons: dict[str, list[str]] = {}
    for algo in dict.fromkeys(plan.algo for plan in plans):
        runs = [plan for plan in plans if plan.algo == algo]
        try:
            check_data(runs, task)
            fit += runs
        except EXPECTED as error:
            reasons.setdefault(one_line(error), []).append(algo)
    for reason, algos in reasons.items():
        which = f" {', '.join(algos)}" if fit or len(reasons) > 1 else ""
        summary.leave_out(f"{dataset}{which}: {reason}")
    return fit


def _in_order(todo: Sequence[tuple[Plan, str]], *, several: bool) -> list[Job]:
    """The order to start runs in.

    First one run for each reference policy, so that those which share it do not wait for each
    other; then the baselines, which take longest; then the rest, neighbours on different seeds.
    """
    width = max(len(name) for name in (_COLUMN, *(name for _, name in todo))) if several else 0
    seen: set[tuple[str, int]] = set()

    def stage(plan: Plan) -> tuple[int, int]:
        if plan.algo in BASELINES:
            slow = _SLOWEST_FIRST
            return 1, slow.index(plan.algo) if plan.algo in slow else -1
        shared = (plan.pretrain_dataset or plan.dataset, plan.seed)
        if shared not in seen and _takes_reference(plan):
            seen.add(shared)
            return 0, 0
        return 2, 0

    algos = list(dict.fromkeys(plan.algo for plan, _ in todo))
    # Sorts are stable: algorithm by algorithm, in each dataset by dataset, in each seed by seed.
    spread = sorted(todo, key=lambda each: algos.index(each[0].algo))
    stages = [stage(plan) for plan, _ in spread]
    first = sorted(range(len(spread)), key=stages.__getitem__)
    return [Job(*spread[i], width) for i in first]


def _takes_reference(plan: Plan) -> bool:
    alone = plan.pretrain_dataset is None and plan.cloning == plan.reference
    return plan.from_reference or (not plan.cuts and alone)


def _run(jobs: Sequence[Job], place: places.Place, summary: Summary) -> None:
    if jobs:
        column = f"{_COLUMN:<{jobs[0].width}} " if jobs[0].width else ""
        tell(f"{column}{_HEADER}   seconds")
    run_all(_one, jobs, place, summary)


def _one(job: Job) -> None:
    """One run, perhaps in a process of its own, with lines on the terminal."""
    plan = job.plan

    def say(stage: str, steps: int, row: Row) -> None:
        score = row.get("normalized_score", row.get("return_mean"))
        if score is not None:
            # Losses of critics can be large; only weighted runs have an effective sample size.
            loss = f"{row['loss']:8.3f}" if abs(row["loss"]) < 1000 else f"{row['loss']:8.1e}"
            ess = f"{row['ESS']:5.2f}" if "ESS" in row else f"{'-':>5}"
            tell(
                f"{job.column}{plan.algo:<12} {plan.seed:>4}  {stage:<9} {row['step']:>6}/"
                f"{steps:<6} {loss} {ess} {score:7.1f} {row['wall_seconds']:9.0f}"
            )

    run(plan, say)
