"""The whole job: checked, claimed, run at a place, and shown."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import rich

from baselines import BASELINES
from benchmarks import monitor, places, stopping
from benchmarks.d4rl.options import Options, Suite, name_of
from benchmarks.d4rl.run import Run, Task, check_run, config_of
from benchmarks.d4rl.settings import name_in_tables
from benchmarks.d4rl.train import Report, train_and_score
from benchmarks.report.tables import score_table
from benchmarks.results import CONTROL, read_runs
from benchmarks.runs import claim, tell
from benchmarks.stopping import expected, one_line
from benchmarks.sweep import Stack, Summary, run_all
from benchmarks.trackers import Write, tracked
from iwsft.training import Row
from iwsft.video import check_recording

# Another number of episodes would give a result that its config does not describe.
SAME = ("settings", "eval_episodes", "env_id", "env_kwargs")
# The longest runs start first, so that none is left running alone at the end.
_SLOWEST_FIRST = ("cql", "dt", "rebrac", "iql", "awac", "td3-bc")


def run_job(options: Options, suite: Suite) -> Summary:
    """Run a checked command line; print scores, summary and, of a suite, the report's page."""
    options = replace(
        options,
        pretrain_dataset=suite.pretrain_dataset and _absolute(suite.pretrain_dataset),
        top=suite.top,
        # Workers on a cluster have a working directory of their own.
        out=options.out if options.cluster is None else options.out.absolute(),
    )
    summary = Summary()
    kinds = len(suite.dataset) * len(suite.algo) + len(suite.cloned)
    items, jobs = kinds if options.stack_seeds else kinds * len(suite.seeds), options.jobs
    with places.place(options.cluster, items=items, jobs=jobs, device=options.device) as place:
        configs = _list_runs(options, suite, summary)
        names = {run.dataset for run in configs}
        root = options.out / Run.benchmark
        resume = configs if options.resume else ()
        runs = _order(claim(root, configs, same=SAME, resume=resume))
        summary.finished_before = len(configs) - len(runs)
        with monitor.shown(runs):
            run_all(_train, _stacks(runs) if options.stack_seeds else runs, place, summary)
    finished = [run for run in read_runs(options.out, CONTROL) if run.dataset in names]
    if finished:
        rich.print(score_table(finished))
    print(summary)
    if options.suite is not None and finished:
        # Draws figures; its imports take seconds.
        from benchmarks.report.page import write_report

        print(f"Report: {write_report(options.out, options.out / 'report').page}")
    return summary


def _absolute(source: str) -> str:
    """A dataset's name, or its absolute path where it is a file."""
    path = Path(source).expanduser()
    if path.suffix and path.is_file():
        return str(path.absolute())
    return "+".join(map(_absolute, source.split("+"))) if "+" in source else source


def _list_runs(options: Options, suite: Suite, summary: Summary) -> dict[Run, dict[str, Any]]:
    """Check the data; all runs that they allow, with the contents of their ``config.json``."""
    configs: dict[Run, dict[str, Any]] = {}
    alone = replace(options, pretrain_dataset=None, top=None)
    rows = [(source, suite.algo, options) for source in suite.dataset]
    rows += [(source, ("bc",), alone) for source in suite.cloned]
    for source, names, given in rows:
        name = name_of(source, given.pretrain_dataset)
        if any(run.dataset == name for run in configs):
            raise ValueError(f"{source}: there is another dataset of the name {name}")
        try:
            task = Task.load(source, given.pretrain_dataset, trust=options.trust_env_module)
        # No network, no file, no package. Wrong names and contents are the user's to mend.
        except (OSError, ImportError) as error:
            if options.suite is None:
                raise
            summary.leave_out(f"{source}: {one_line(error)}")
            continue
        runs: list[Run] = []
        problems: dict[str, list[str]] = {}
        path, known = _absolute(source), name_in_tables(task.dataset)
        for algo in names:
            several = [Run(name, algo, seed, given, path, known) for seed in suite.seeds]
            try:
                if not runs:
                    task.check_environment()
                    if given.video:
                        check_recording(task.env_id, task.dataset.env_kwargs)
                check_run(several[0], task)
                runs += several
            except expected() as error:
                if options.suite is None:
                    raise
                problems.setdefault(one_line(error), []).append(algo)
        for problem, algos in problems.items():
            which = f" {', '.join(algos)}" if runs or len(problems) > 1 else ""
            summary.leave_out(f"{source}{which}: {problem}")
        added = {run: config_of(run, task) for run in runs}
        recorded = [config["settings"] for config in added.values()]
        origins = dict.fromkeys(each.get("settings_from", "Appendix F") for each in recorded)
        for known in {run.table_name for run in added}:
            other = "" if "-" in known else " (--settings-of NAME takes those of a dataset)"
            tell(f"{name}: settings of {known}: {'; '.join(origins)}{other}")
        configs |= added
    if not configs:
        raise ValueError("nothing to run is left: " + "; ".join(summary.left_out))
    return configs


def _order(runs: Sequence[Run]) -> list[Run]:
    """The order to start runs in: one of each reference policy, slow baselines, then the rest."""
    seen: set[tuple[str, int]] = set()

    def stage(run: Run) -> tuple[int, int]:
        if run.algo in BASELINES:
            known = run.algo in _SLOWEST_FIRST
            return 1, _SLOWEST_FIRST.index(run.algo) if known else -1
        shared = (run.options.pretrain_dataset or run.source, run.seed)
        if run.uses_reference and shared not in seen:
            seen.add(shared)
            return 0, 0
        return 2, 0

    algos = list(dict.fromkeys(run.algo for run in runs))
    # Sorts are stable: algorithm by algorithm, in each dataset by dataset, in each seed by seed.
    spread = sorted(runs, key=lambda run: algos.index(run.algo))
    return sorted(spread, key=stage)


def _stacks(runs: Sequence[Run]) -> list[Run | Stack]:
    """Runs that differ in their seed alone, together, in the order of their first."""
    alike: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.dataset, run.algo, run.options), []).append(run)
    return [Stack(tuple(group)) if len(group) > 1 else group[0] for group in alike.values()]


def _train(item: Run | Stack) -> list[Exception | None]:
    """One run or stack, perhaps in a process of its own; each run writes how far it is."""
    runs: Any = item.runs
    with ExitStack() as stack:
        reports = []
        for run in runs:
            stack.enter_context(monitor.noted(run.folder))
            write = stack.enter_context(tracked(run, run.options.report_to))
            monitor.note(run.folder, "loading")
            reports.append(_report(run, write))
        outcomes = train_and_score(runs, reports)
    return [each if isinstance(each, Exception) else None for each in outcomes]


def _report(run: Run, write: Write) -> Report:
    """A function that shows the progress of a run, and sends its metrics to its trackers."""
    shown: Row = {}

    def report(stage: str, steps: int, row: Row) -> None:
        stopping.check()
        # A score is measured less often than a loss.
        shown.update(row)
        if "normalized_score" in shown:
            shown.pop("return_mean", None)
        monitor.note(run.folder, stage, row["step"], steps, shown)
        if stage not in ("reference", "scoring"):
            write(int(row["step"]), {name: row[name] for name in row if name != "step"})

    return report
