"""The whole job: checked, claimed, run in this process, on the cores or under accelerate, shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from benchmarks import places, sweep
from benchmarks.llm.algorithms import BASE
from benchmarks.llm.arguments import Arguments, asked, settings_of
from benchmarks.llm.checks import check
from benchmarks.llm.hardware import Hardware
from benchmarks.llm.launch import Launch, choose, launched, start
from benchmarks.llm.memory import DecoderSizes, Setup
from benchmarks.llm.plan import Plan, config_of
from benchmarks.llm.recipes import load_recipe
from benchmarks.llm.recipes.recipe import Prepared
from benchmarks.llm.run import arguments_of, run
from benchmarks.runs import RESULT, claim, tell
from benchmarks.sweep import Summary

_COLUMNS = "{:<12} {:>4} {:>13} {:>8} {:>5} {:>6} {:>6} {:>7}"
_HEADER = _COLUMNS.format("algo", "seed", "update", "loss", "ESS", "max w", "score", "seconds")


def job(arguments: Arguments) -> int:
    """Run what the command line asks for; show and write the results.

    A run that fails is reported, and the others go on; with ``--deepspeed`` it ends the job.

    Returns:
        The exit status: 0 where all runs are done.

    Raises:
        ValueError: and others of ``EXPECTED``, naming what is wrong and the way out.
    """
    plans = _plans(arguments)
    launch = launched()
    if launch is not None:
        _take_part(plans, launch)
        return 0
    if arguments.deepspeed is not None:
        return _launch(arguments, plans)
    check_shares(plans, None)
    todo = _claimed(plans, None, arguments.resume)
    summary = Summary(finished_before=len(plans) - len(todo))
    if todo:
        # What is shared by all seeds, such as a base model, is made once.
        _show_notes(todo[0].prepare())
        _run(todo, arguments.jobs, summary)
    _show(plans[0], summary)
    return 1 if summary.failed else 0


def check_shares(plans: Sequence[Plan], launch: Launch | None) -> None:
    """See that batches can be shared out over the processes.

    Raises:
        ValueError: they can't.
    """
    for plan in plans:
        if plan.algorithm is not None:
            arguments_of(plan, plan.algorithm, launch)


def _plans(arguments: Arguments) -> list[Plan]:
    recipe = load_recipe(arguments.recipe)
    settings = settings_of(recipe, asked(arguments.settings))
    check(arguments, settings)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs = _jobs(arguments.jobs, device)

    def plan(algo: str, seed: int) -> Plan:
        return Plan(
            recipe=arguments.recipe,
            algo=algo,
            seed=seed,
            settings=settings,
            model=arguments.model,
            trust_remote_code=arguments.trust_remote_code,
            data=arguments.data,
            device=device,
            threads=_threads(jobs),
            log_every=arguments.log_every,
            save_every=arguments.save_every,
            report_to=arguments.report_to,
            out=str(arguments.out),
        )

    seeds = arguments.seeds_or_default
    # The base is the same for all seeds.
    return [
        plan(algo, seed)
        for algo in arguments.algo
        for seed in (seeds[:1] if algo == BASE else seeds)
    ]


def _jobs(said: int | None, device: str) -> int:
    if said is not None:
        return said
    return 1 if device != "cpu" else places.cores()


def _threads(jobs: int) -> int:
    """Of a run, where ``jobs`` run beside each other: all cores are used, none twice."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, places.cores() // jobs)


def _claimed(plans: Sequence[Plan], launch: Launch | None, resume: bool) -> list[Plan]:
    root = plans[0].recipe_folder
    configs = {plan.folder: config_of(plan, launch) for plan in plans}
    unfinished = claim(root, configs, same=("settings",), resume=resume)
    return [plan for plan in plans if plan.folder in unfinished]


def _run(todo: Sequence[Plan], jobs: int | None, summary: Summary) -> None:
    tell(_HEADER)
    with places.place(None, items=len(todo), jobs=_jobs(jobs, todo[0].device)) as place:
        sweep.run_all(_told, todo, place, summary)


def _told(plan: Plan, launch: Launch | None = None) -> None:
    """One run, with lines on the terminal."""

    def say(step: int, steps: int, row: dict[str, float]) -> None:
        weights = f"{row['ESS']:.2f}", f"{row['weight_max']:.2f}"
        line(f"{step}/{steps}", f"{row['loss']:.3f}", *weights, "", row["wall_seconds"])

    def line(at: str, loss: str, ess: str, largest: str, score: str, seconds: float) -> None:
        cells = at, loss, ess, largest, score, f"{seconds:.0f}"
        tell(_COLUMNS.format(plan.algo, plan.seed, *cells))

    result = run(plan, say, launch)
    if result is not None:
        line("tested", "", "", "", f"{result['score']:.3f}", result["wall_seconds"])


def _launch(arguments: Arguments, plans: Sequence[Plan]) -> int:
    """Start the job again under accelerate, one run after the other in the same processes."""
    hardware = Hardware.here()
    chosen = arguments.deepspeed[0] if arguments.deepspeed else None
    prepared: Prepared | None = None
    if chosen is None and hardware.gpus:
        # Which config fits hangs on the model.
        prepared = plans[0].prepare()
        model, setup = _sizes(prepared, plans[0])
        launch = choose(None, hardware, model=model, setup=setup)
    else:
        launch = choose(chosen, hardware)
    check_shares(plans, launch)
    if hardware.node_rank == 0:
        todo = _claimed(plans, launch, arguments.resume)
        summary = Summary(finished_before=len(plans) - len(todo))
    if hardware.node_rank > 0 or todo:
        # Once, and not by all processes side by side.
        prepared = prepared or plans[0].prepare()
        _show_notes(prepared)
        for plan in {plan.seed: plan for plan in plans}.values():
            plan.prepare()
        tell(f"{launch.config}: {launch.processes} processes on {launch.device}")
        status = start(launch, "benchmarks.llm", sys.argv[1:])
        if status:
            return status
    if hardware.node_rank == 0:
        summary.done = len(todo)
        _show(plans[0], summary)
    return 0


def _sizes(prepared: Prepared, plan: Plan) -> tuple[DecoderSizes, Setup]:
    from transformers import AutoConfig

    settings = plan.settings
    setup = Setup(
        half=settings.precision == "bfloat16",
        checkpointing=settings.gradient_checkpointing,
        tokens=(settings.micro_batch_size or 1) * (settings.max_length or 4096),
        proposal="current" if plan.algorithm is None else plan.algorithm.proposal,
    )
    trusted = prepared.load_kwargs.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(prepared.model, trust_remote_code=trusted)
    return DecoderSizes.of(config), setup


def _take_part(plans: Sequence[Plan], launch: Launch) -> None:
    """The runs that are not finished, as one of several processes."""
    first = os.environ.get("RANK", "0") == "0"
    todo = [plan for plan in plans if not (plan.folder / RESULT).exists()]
    if first:
        tell(_HEADER)
    # The base is tested by one process alone, when the others have no more work.
    for plan in sorted(todo, key=lambda plan: plan.algo == BASE):
        if first or plan.algo != BASE:
            _told(plan, launch)
    if first and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _show_notes(prepared: Prepared) -> None:
    for name, value in prepared.notes.items():
        tell(f"{name}: {value}")


def _show(plan: Plan, summary: Summary) -> None:
    """Print the table of all finished runs of the recipe, write it as JSON, and draw it."""
    from benchmarks.llm.results import read, summarise, write
    from benchmarks.llm.table import table

    console = Console()
    results = read(plan.recipe_folder)
    if results:
        from benchmarks.llm.plot import draw

        rows = summarise(results)
        console.print(table(plan.recipe, rows))
        written = [
            write(plan.recipe_folder, rows),
            draw(plan.recipe_folder, rows),
        ]
        console.print(*map(str, written), sep="\n", highlight=False, markup=False, soft_wrap=True)
    console.print(str(summary), highlight=False, markup=False, soft_wrap=True)
