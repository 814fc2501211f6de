"""The whole job: runs are claimed, run in this process, on the cores or under accelerate, shown."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import rich
import torch
from tensordict import TensorDictBase
from transformers import AutoModelForCausalLM

from benchmarks import monitor, places, sweep
from benchmarks.commands import program, typed
from benchmarks.llm.card import write_card
from benchmarks.llm.contents import changed_source, contents_of, moved_sources, recorded_settings
from benchmarks.llm.curation import why_unweighted
from benchmarks.llm.launch import Hardware, Launch, States, choose, launched, start, threads_of
from benchmarks.llm.models import load_config, shortest
from benchmarks.llm.options import ALGORITHMS, BASE, Options, own_warmup, recorded, to_file
from benchmarks.llm.recipes import Prepared, load_recipe
from benchmarks.llm.run import (
    Run,
    commits_in,
    curated_of,
    prepare,
    train_and_score,
    training_arguments,
    warmup_problem,
)
from benchmarks.llm.settings import Settings
from benchmarks.runs import RESULT, claim, hardware, tell, versions
from benchmarks.sweep import Summary
from iwsft.datasets.text.rows import Row, check_scores
from iwsft.files import write_json
from iwsft.language import tokenize
from iwsft.language.shards import compile_nothing
from iwsft.policies.causal_lm_families import check_switch, context_of
from iwsft.trajectory import DATA_WEIGHT, TRAJ_IDS, lengths

# Options that say what a recipe prepares.
_SOURCES = ("model", "data", "eval_data", "eval_share")
_DataOf = Callable[[Run], TensorDictBase]
_PACKAGES = ("iwsft", "torch", "tensordict", "torchrl", "transformers", "accelerate", "numpy")


def run_job(options: Options) -> int:
    """Run what the command line asks for, show the results, and return the exit status."""
    started = launched()
    launch = started or Launch("single", device=options.own_device)
    runs = [
        Run(options.recipe, algo, seed, options, launch)
        for algo in options.algo
        # The base is the same for all seeds.
        for seed in (options.seeds[:1] if algo == BASE else options.seeds)
    ]
    runs = _as_recorded(runs)
    if started is not None:
        _take_part(runs)
        return 0
    if options.deepspeed is not None:
        return _launch(runs, options, sys.argv[1:])
    # What all seeds share, such as a base model, is made once.
    _prepare(runs, _open(runs)[:1])
    unfinished = _claim(runs)
    summary = Summary(finished_before=len(runs) - len(unfinished))
    if unfinished:
        jobs = options.jobs or (1 if options.own_device != "cpu" else places.cores())
        # All cores are used, none twice.
        work = partial(_work_on, threads=threads_of(places.cores(), jobs))
        place = places.place(None, items=len(unfinished), jobs=jobs)
        with place as here, monitor.shown(unfinished):
            sweep.run_all(work, unfinished, here, summary)
    _show(runs, summary)
    return 1 if summary.failed else 0


def fine_tune(options: Options) -> Run:
    """Do the one run of the options, whose rows must have been checked, and write its card."""
    launch = Launch("single", device=options.own_device)
    [run] = _as_recorded([Run(options.recipe, options.algo[0], options.seeds[0], options, launch)])
    if options.deepspeed is not None:
        file = run.dataset_folder / "options.json"
        write_json(file, to_file(options, run.algo, run.seed))
        words = ["--config", str(file), "--out", str(options.out), "--resume"]
        if status := _launch([run], options, words, show=False):
            raise SystemExit(status)
    else:
        unfinished = _claim([run])
        with monitor.shown(unfinished):
            for each in unfinished:
                _work_on(each, threads=threads_of(places.cores(), 1))
    write_card(run.folder)
    return run


def _as_recorded(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the commits that the first of them to have a ``config.json`` recorded.

    So model and rows stay the same where the hub has newer ones, and it need not be asked.
    """
    recorded = next(filter(None, map(recorded_settings, runs)), {})
    commits = {
        name: commit
        for name, commit in commits_in(recorded).items()
        if recorded.get(name) == getattr(runs[0].options, name)
    }
    return [replace(run, commits=commits) for run in runs]


def _config_of(run: Run, contents: Mapping[str, str]) -> dict[str, Any]:
    """Describe a run for ``config.json``; a resumed run must agree in ``settings``.

    ``contents`` are those of :func:`benchmarks.llm.contents.contents_of`.
    """
    options = run.options
    settings: dict[str, Any] = {
        "recipe": run.dataset,
        "algo": run.algo,
        "seed": run.seed,
        **{name: value for name in _SOURCES if (value := getattr(options, name)) is not None},
    }
    settings |= {**moved_sources(run, contents), **contents}
    # The base has no settings of training, and its test is cut, too.
    settings |= run.own_length
    if run.algorithm is not None:
        settings["training"] = recorded(options.settings, run.algorithm)
    return {
        **run.identity,
        "settings": settings,
        **run.engine,
        "versions": versions(_PACKAGES),
        "hardware": hardware(run.launch.device),
        "command": typed("llm"),
        "options": to_file(options, run.algo, run.seed),
    }


def _open(runs: Sequence[Run]) -> list[Run]:
    """The runs that need model and rows: those that ``--resume`` does not find finished."""
    resume = runs[0].options.resume
    return [run for run in runs if not resume or not (run.folder / RESULT).exists()]


def _claim(runs: Sequence[Run]) -> list[Run]:
    """Claim the folders, and return the unfinished runs; one of the same base is taken as it is."""
    contents = contents_of(runs[0])
    # What is loaded from now on is what config.json names.
    runs = [replace(run, commits=commits_in(contents)) for run in runs]
    base = {run for run in runs if run.algo == BASE}
    configs = {run: _config_of(run, contents) for run in runs}
    resume = set(runs) if runs[0].options.resume else base
    return claim(runs[0].dataset_folder, configs, same=("settings",), resume=resume)


def _prepare(runs: Sequence[Run], seeds: Sequence[Run]) -> None:
    """Prepare model and rows for a run of each seed, and check that they suit all runs.

    Nothing is claimed before, so that a problem leaves no folder.
    """
    for run in runs:
        if run.algorithm is not None:
            training_arguments(run, run.algorithm)
    if not seeds:
        return
    prepared, *_ = [prepare(run) for run in seeds]
    trained = [*{run.algo: run for run in runs if run.algorithm is not None}.values()]
    for run in trained:
        _check_scores(run.algo, run.options.settings, prepared.rows)
    made: dict[Any, TensorDictBase] = {}

    def data_of(run: Run) -> TensorDictBase:
        """The curated rows, made once for all algorithms that curate alike."""
        assert run.algorithm is not None
        key = replace(run.algorithm, proposal="current", per_step=False), run.settings.q
        if key not in made:
            made[key] = curated_of(run, prepared, run.tokenizer(prepared))
        return made[key]

    for run in trained[:1]:
        _check_rows(run, prepared, data_of(run))
        if run.options.data:
            _tell_of_template(prepared.rows, run.tokenizer(prepared).chat_template)
    for run in trained:
        _check_weights(run, prepared, data_of)
        _check_warmup(run, data_of)
        if run.settings.q and (reason := why_unweighted(prepared.rows)):
            tell(f"{run}: {reason}")
    for name, value in prepared.notes.items():
        tell(f"{name}: {_in_words(value)}")


def _check_rows(run: Run, prepared: Prepared, data: TensorDictBase) -> None:
    """Check that the curated rows fit in the context; those of the test are cut to it."""
    recipe, trusted = load_recipe(run.dataset), run.options.trust_remote_code
    if run.settings.normalize_data_weights and data.get(DATA_WEIGHT, default=None) is None:
        raise ValueError("--normalize-data-weights changes nothing: no row has a weight")
    config = load_config(prepared.model, trust_remote_code=trusted)
    context, longest = context_of(config), int(lengths(data).max())
    if context is not None and longest > context:
        raise ValueError(
            f"a row of training has {longest} tokens, and {prepared.model} reads {context} "
            f"(max_position_embeddings); pass --max-length {context}, or another model"
        )
    check_switch(config, data.get(TRAJ_IDS))
    if rows := recipe.tested_rows(prepared):
        most = shortest(prepared.max_length, context)
        with warnings.catch_warnings(record=True, action="always") as caught:
            tested = tokenize(rows, run.tokenizer(prepared), max_length=most).trajectories
        for each in caught:
            warnings.warn(f"rows of the test: {each.message}", stacklevel=2)
        check_switch(config, tested.get(TRAJ_IDS))


def _tell_of_template(rows: Sequence[Row], template: str | None) -> None:
    """Tell of rows that train a chat model on other texts than it reads in a chat."""
    if template and (plain := sum(row.messages is None for row in rows)):
        tell(
            f"rows of prompt and completion: {plain}, joined without the model's chat template. "
            "For a model that is asked in chats, write 'messages'"
        )


def _in_words(value: Any) -> str:
    """A note's value; of several, each with its name."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(inner)}" for name, inner in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _check_scores(algo: str, settings: Settings, rows: Sequence[Row]) -> None:
    """Check that rows have what an algorithm reads: scores that differ, or right and wrong ones."""
    if ALGORITHMS[algo].signed:
        if {row.correct for row in rows} != {False, True}:
            raise ValueError(
                f"{algo} learns from right and wrong answers: the rows need a column 'correct' "
                "with both"
            )
        return
    cuts = settings.quality_cuts if ALGORITHMS[algo].quality else settings.cuts
    weighs, counted = ALGORITHMS[algo].by_score, any(row.count is not None for row in rows)
    if cuts and counted:
        tell(f"{algo}: the rows have a 'count', so no cut by score is made")
    if weighs or (cuts and not counted):
        try:
            check_scores([row for row in rows if row.correct is not False])
        except ValueError as error:
            verb = "weighs" if weighs else "cuts"
            raise ValueError(f"{algo} {verb} by score, but {error}") from error
        return
    # Rows with a verdict are chosen by it.
    judged = counted or settings.q is not None
    judged |= any(row.correct is not None or row.weight is not None for row in rows)
    if not judged and len({row.score for row in rows}) > 1:
        tell(
            f"{algo}: the scores are not used: all {len(rows)} rows are in D+. --cuts 50 keeps the "
            "better half, and --algo iw-sft-q counts better rows more often"
        )


def _check_weights(run: Run, prepared: Prepared, data_of: _DataOf) -> None:
    """Check that the loss of a run has a minimum with the rows' negative weights, if there are."""
    negative = next((row.where for row in prepared.rows if _has_negative_weight(row)), None)
    if run.algorithm is None or negative is None:
        return
    weight = data_of(run).get(DATA_WEIGHT, default=torch.ones(()))
    chain = run.algorithm.importance_weights(run.options.settings)
    try:
        chain.check_data_weights(weight, "weight", run.algorithm.proposal)
    except ValueError as error:
        raise ValueError(
            f"{negative}: the weight is negative, and the loss of {run.algo} then has no lower "
            "bound; drop such rows, or take --algo dft, or iw-sft with --no-self-normalize and a "
            "finite --max-weight"
        ) from error


def _check_warmup(run: Run, data_of: _DataOf) -> None:
    """Check that a warm-up that was asked for ends within the updates that --epochs give."""
    settings = run.options.settings
    asked = settings.warmup != own_warmup(run.options)
    if not (asked and settings.epochs):
        return
    if problem := warmup_problem(run, data_of(run)):
        raise ValueError(f"{run.algo}: {problem}")


def _has_negative_weight(row: Row) -> bool:
    of_row = row.weight if isinstance(row.weight, tuple) else (row.weight or 0.0,)
    return min(0.0, *of_row, *(turn.get("weight", 0.0) for turn in row.messages or ())) < 0


def _work_on(run: Run, *, threads: int | None = None) -> None:
    """Train and test one run, perhaps in a process of its own."""
    if threads is not None and run.launch.device == "cpu":
        torch.set_num_threads(threads)
    with monitor.noted(run.folder):
        if path := changed_source(run):
            problem = f"{path} has changed since these runs began, so they would differ in it"
            way_out = "put it back and pass --resume, or choose another --out"
            raise ValueError(f"{problem}; {way_out}")
        train_and_score(run)


def _launch(
    runs: Sequence[Run], options: Options, words: Sequence[str], *, show: bool = True
) -> int:
    """Start the job again under accelerate by ``words``, one run after the other."""
    hardware = Hardware.here()
    states = None
    if not options.deepspeed and hardware.gpus:
        # Which config fits depends on the model.
        states = _states(prepare(runs[0]).model, runs[0])
    launch = choose(options.deepspeed[0] if options.deepspeed else None, hardware, states)
    launch.check_startable()
    runs = [replace(run, launch=launch) for run in runs]
    # Once, and not by all processes at a time.
    _prepare(runs, [*{run.seed: run for run in _open(runs)}.values()])
    unfinished = _claim(runs) if hardware.node_rank == 0 else list(runs)
    if unfinished:
        tell(f"{launch.config}: {launch.processes} processes on {launch.device}")
        status = start(launch, "benchmarks.llm", words)
        if status:
            return status
    if show and hardware.node_rank == 0:
        _show(runs, Summary(len(unfinished), len(runs) - len(unfinished)))
    return 0


def _states(model: str, run: Run) -> States:
    """What training the model has in memory, apart from activations."""
    settings, trusted = run.options.settings, run.options.trust_remote_code
    config = load_config(model, trust_remote_code=trusted)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    parameters = made.num_parameters()
    return States.of(
        parameters,
        # Adapters are small against the model.
        trained=0 if settings.lora_rank is not None else parameters,
        half=settings.precision == "bfloat16",
        lagged=run.algorithm is not None and run.algorithm.proposal == "lagged",
    )


def _take_part(runs: Sequence[Run]) -> None:
    """Do the runs that are not finished, as one of several processes."""
    launch = runs[0].launch
    if launch.engine == "deepspeed" and launch.device == "cpu":
        compile_nothing()
    first = os.environ.get("RANK", "0") == "0"
    unfinished = [run for run in runs if not (run.folder / RESULT).exists()]
    with monitor.shown(unfinished) if first else nullcontext():
        # The base is tested by one process alone, when the others have no more work.
        for run in sorted(unfinished, key=lambda run: run.algo == BASE):
            if first or run.algo != BASE:
                _work_on(run)
            if first:
                sweep.tell_score(run)
    if first and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _show(runs: Sequence[Run], summary: Summary) -> None:
    """Print the table of all finished runs of the recipe; write their report and the cards."""
    from benchmarks.report.language import changes, read_recipes, recipe_table
    from benchmarks.report.page import write_report

    folder = runs[0].dataset_folder
    # Runs that were tested on other items are apart; their name is longer.
    recipe, *others = read_recipes(folder)
    for other in others:
        rich.print(recipe_table(other))
    if recipe.scores:
        rich.print(recipe_table(recipe))
        page = write_report(folder, folder / "report").page
        print(*changes(recipe), f"Report: {page}", sep="\n")
    cards = [card for run in runs if (card := write_card(run.folder))]
    print(summary, *(f"Model, with its card: {card.parent}" for card in cards), sep="\n")
    if cards:
        asked = f"{program('llm evaluate')} --model {cards[-1].parent} --tasks NAME=FILE"
        print(f"Next: {asked} grades answers to questions of your own")
