"""A run of a language model: its rows, training and test, ``config.json`` and ``result.json``.

The same call continues what a kill leaves of a run, from its last checkpoint or at its test.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment  # type: ignore[import-untyped]
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from tensordict import TensorDictBase
from transformers import PreTrainedModel, PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from benchmarks import monitor, runs
from benchmarks.llm.curation import curated, effective, why_unweighted
from benchmarks.llm.launch import Launch, assert_engine, launched
from benchmarks.llm.models import (
    check_fit,
    check_whole,
    load,
    load_config,
    load_tokenizer,
    locate,
    split_commit,
    with_adapters,
    with_commit,
)
from benchmarks.llm.options import (
    ALGORITHMS,
    BASE,
    Algorithm,
    Options,
    choose_q,
    describe_warmup,
    uses,
)
from benchmarks.llm.progress import Progress, now
from benchmarks.llm.recipes import Prepared, Sources, load_recipe
from benchmarks.llm.settings import Settings
from benchmarks.runs import RESULT
from iwsft import checkpoint
from iwsft.files import alone_in, write_json
from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.saving import last, written_aside
from iwsft.language.trainer import ImportanceWeightedTrainer
from iwsft.lower_bound import Choice
from iwsft.trajectory import MULTIPLICITY, lengths

CHECKPOINTS = "checkpoints"
# Share of the weights beyond which a clip, and not the policy, decides what they are.
_MOST_CLIPPED = 0.5
# What training took, once the model is saved; a kill during the test leaves it.
TRAINED = "trained.json"
# Settings that are arguments of the trainer as they are.
_SAME_NAME = (
    *("length_normalize", "normalize_data_weights", "layout"),
    *("learning_rate", "weight_decay"),
    *("adam_beta1", "adam_beta2", "max_grad_norm"),
)


@dataclass(frozen=True)
class Run(runs.Run[Options]):
    """A run of a language model: its dataset is the recipe, ``launch`` the processes it runs in.

    ``commits`` are those of its model and rows of the hub, by the name of the option.
    """

    benchmark = "llm"
    launch: Launch
    commits: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def algorithm(self) -> Algorithm | None:
        """The algorithm; None for the base, which is not trained."""
        return None if self.algo == BASE else ALGORITHMS[self.algo]

    @property
    def settings(self) -> Settings:
        """The settings of training, with q only where the algorithm chooses it."""
        settings, algorithm = self.options.settings, self.algorithm
        used = algorithm is None or uses("q", algorithm, settings)
        return settings if used else replace(settings, q=None)

    @property
    def own_length(self) -> dict[str, int | str]:
        """The length that rows of training and test are cut to, where the recipe has another."""
        most = self.settings.max_length
        if most == load_recipe(self.dataset).defaults.max_length:
            return {}
        return {"max_length": "none" if most is None else most}

    @property
    def shared_folder(self) -> Path:
        """Folder of what the runs of a recipe share: base models, rows, reference log-probs."""
        return self.dataset_folder / "prepared"

    @property
    def engine(self) -> dict[str, Any]:
        """What trains, for ``config.json`` and ``result.json``."""
        return {"engine": self.launch.engine_name, "processes": self.launch.processes}

    def load(self, model: str, **options: Any) -> tuple[PreTrainedModel, Any]:
        """Load a model and its tokenizer, see :func:`benchmarks.llm.models.load`.

        Training and test have one number format, whatever the files have: rounding of the base
        alone would be taken for an effect of training.
        """
        # DeepSpeed keeps float32 weights of its own.
        half = self.settings.precision == "bfloat16" and self.launch.engine == "deepspeed"
        options |= {"dtype": torch.bfloat16 if half else torch.float32}
        trusted = self.options.trust_remote_code
        return load(model, cache=self.shared_folder, trust_remote_code=trusted, **options)

    def tokenizer(self, prepared: Prepared) -> Any:
        """Load the tokenizer of the model to train, with the recipe's own padding token."""
        place, trusted = locate(prepared.model, self.shared_folder), self.options.trust_remote_code
        tokenizer = load_tokenizer(place, trust_remote_code=trusted)
        tokenizer.pad_token = prepared.notes.get("pad_token", tokenizer.pad_token)
        return tokenizer


def commits_in(settings: Mapping[str, Any]) -> dict[str, str]:
    """The commits that the settings of a ``config.json`` name, see :class:`Run`."""
    keys = {name: f"{name}_commit" for name in ("model", "data", "eval_data")}
    return {name: settings[key] for name, key in keys.items() if key in settings}


def prepare(run: Run) -> Prepared:
    """Make model and rows, or find them in the cache of a recipe's runs; see ``Recipe.prepare``."""
    options, recipe = run.options, load_recipe(run.dataset)
    given = {each.name: getattr(options, each.name) for each in fields(Sources)}
    for name, commit in run.commits.items():
        given[name] = with_commit(given[name] or getattr(recipe, name), commit)
    sources = Sources(**given)
    if options.model is not None:
        assert sources.model is not None
        # Before rows are read, which may be downloaded.
        place, trusted = locate(sources.model, run.shared_folder), options.trust_remote_code
        check_whole(place)
        config = load_config(place, trust_remote_code=trusted)
        check_fit(options.model, config, load_tokenizer(place, trust_remote_code=trusted))
    prepared = recipe.prepare(run.shared_folder, sources, seed=run.seed)
    name = prepared.score_name
    if run.own_length and recipe.tested_rows(prepared):
        name += f", max_length {run.own_length['max_length']}"
    return replace(prepared, score_name=name, max_length=run.settings.max_length)


def curated_of(run: Run, prepared: Prepared, tokenizer: Any) -> TensorDictBase:
    """Curate a recipe's rows for a run, see :func:`benchmarks.llm.curation.curated`."""
    assert run.algorithm is not None
    rows = prepared.rows
    settings = effective(run.settings, rows)
    return curated(rows, tokenizer, run.algorithm, settings, seed=run.seed)


def warmup_problem(run: Run, data: TensorDictBase) -> str | None:
    """Why a run by epochs of curated rows never reaches its learning rate; None if it does."""
    return describe_warmup(run.settings, _updates(run, data)) if run.settings.epochs else None


def _sync_problem(run: Run, data: TensorDictBase) -> str | None:
    """Why a run ends before the first hard sync of q, in words; None if it does not."""
    updates, every = _updates(run, data), run.settings.sync_every
    if run.algorithm is None or run.algorithm.proposal != "cached" or updates > every:
        return None
    return (
        f"--sync-every {every} leaves all weights at 1, as in SFT: the updates are {updates}; pass "
        "a smaller one, or train longer"
    )


def _updates(run: Run, data: TensorDictBase) -> int:
    """Number of updates on curated rows."""
    settings = run.settings
    an_epoch = math.ceil(int(_multiplicity(data).sum()) / settings.batch_size)
    return settings.max_steps or math.ceil((settings.epochs or 1.0) * an_epoch)


def _multiplicity(data: TensorDictBase) -> torch.Tensor:
    """How often an epoch has each trajectory."""
    return data.get(MULTIPLICITY)[lengths(data).cumsum(0) - 1]


def train_and_score(run: Run) -> None:
    """Train and test one run, whose folder must be claimed, with lines on the terminal."""
    # transformers' bars of every load and every note on padding.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # DeepSpeed calls torch by deprecated names at each gather, PEFT calls transformers so.
    for module in ("torch.distributed", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    # Told when the rows were checked.
    warnings.filterwarnings("ignore", message=".*: not read: |max_length=.* cut ")
    first = os.environ.get("RANK", "0") == "0"
    with alone_in(run.folder, wait=False) if first else nullcontext():
        if first:
            monitor.note(run.folder, "preparing")
        with _in_one_process():
            prepared = prepare(run)
        trained: dict[str, Any] = {"steps": 0}
        model = prepared.model
        if run.algorithm is not None:
            trained = _train(run, run.algorithm, prepared)
            model = str(run.folder / checkpoint.FOLDER)
        together = run.algorithm is not None and run.launch.processes > 1
        # All make it together, before one tests alone.
        group = _patient_group() if together else None
        if first:
            monitor.note(run.folder, "testing")
            _test(run, prepared, model, trained)
        if together:
            torch.distributed.barrier(group=group)


def _test(run: Run, prepared: Prepared, model: str, trained: dict[str, Any]) -> None:
    """Test a model as it is saved, in one process, and write ``result.json``."""
    start = now()
    # A model that is trained in shards may be larger than a GPU.
    sharded = run.launch.engine != "single" and run.launch.device == "cuda"
    with _in_one_process():
        tested: Any
        tested, tokenizer = run.load(model, **({"device_map": "auto"} if sharded else {}))
        if not sharded:
            tested.to(run.launch.device)
        recipe = load_recipe(run.dataset)
        score = recipe.evaluate(tested.eval(), tokenizer, prepared, seed=run.seed)
    cpu, wall = (now() - start).tolist()
    result = {
        **run.identity,
        "score_name": prepared.score_name,
        **score,
        **trained,
        "cpu_seconds": trained.get("cpu_seconds", 0.0) + cpu,
        "wall_seconds": trained.get("wall_seconds", 0.0) + wall,
        "evaluation_cpu_seconds": cpu,
        **run.engine,
        "notes": dict(prepared.notes),
    }
    write_json(run.folder / RESULT, result)
    (run.folder / TRAINED).unlink(missing_ok=True)


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Lift the engine's settings until the next ``TrainingArguments``: no shards, no steps."""
    unset_hf_deepspeed_config()
    # By FSDP's setting only the first process would have the weights.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        yield


# A process group whose barriers wait for the process that tests, however long it takes.
_patient_group = cache(lambda: torch.distributed.new_group(backend="gloo", timeout=timedelta(7)))


def training_arguments(run: Run, algorithm: Algorithm) -> dict[str, Any]:
    """Make the arguments of ``ImportanceWeightedConfig``, and check that they fit the processes."""
    options, settings, processes = run.options, run.settings, run.launch.processes
    own, rest = divmod(settings.batch_size, processes)
    if rest:
        raise ValueError(
            f"--batch-size {settings.batch_size}: not a multiple of {processes} processes"
        )
    micro = min(settings.micro_batch_size or own, own)
    accumulation, rest = divmod(own, micro)
    if rest:
        raise ValueError(f"--micro-batch-size {micro} does not divide the {own} draws of a process")
    proposal, sync_every = choose_q(algorithm, settings, accumulation * processes)
    on_cpu = run.launch.device == "cpu"
    cache = None if proposal == "reference" else str(run.shared_folder / "reference")
    return {
        "output_dir": str(run.folder / CHECKPOINTS),
        "proposal": proposal,
        "reference": algorithm.importance_weights(settings).reference,
        "sync_every": sync_every,
        "ema_decay": settings.ema_decay if proposal == "lagged" else None,
        "reference_cache": cache,
        **{name: getattr(settings, name) for name in _SAME_NAME},
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": settings.warmup,
        "max_steps": settings.max_steps or -1,
        "num_train_epochs": settings.epochs or 1.0,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        # transformers 5 warns of the name, which earlier ones need, wherever it is set.
        **({"gradient_checkpointing": True} if settings.gradient_checkpointing else {}),
        "bf16": settings.precision == "bfloat16",
        "seed": run.seed,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "logging_steps": options.log_every,
        "save_strategy": "steps",
        "save_steps": options.save_every or 0.2,
        "save_total_limit": 1,
        "report_to": list(options.report_to),
        "run_name": str(run),
        "disable_tqdm": True,
    }


def _trainer(
    run: Run,
    args: Any,
    prepared: Prepared,
    tokenizer: Any,
    data: TensorDictBase,
    progress: Progress,
) -> ImportanceWeightedTrainer:
    """Load the model to train, and make its trainer."""
    settings, algorithm = run.settings, run.algorithm
    assert algorithm is not None
    model: Any
    model, _ = run.load(prepared.model)
    if settings.lora_rank is not None:
        commit = split_commit(prepared.model)[1]
        model = with_adapters(model, settings.lora_rank, seed=run.seed, commit=commit)
    trainer = ImportanceWeightedTrainer(
        model,
        args,
        trajectories=data,
        importance_weights=algorithm.importance_weights(effective(settings, prepared.rows)),
        processing_class=tokenizer,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    if launched() is not None:
        assert_engine(trainer.accelerator, run.launch)
    return trainer


def _last_choice(run: Run, prepared: Prepared, rows: list[dict[str, float]]) -> dict[str, Any]:
    """What the judged rows chose last, or why they could not choose."""
    reason = why_unweighted(prepared.rows)
    if reason is not None:
        return {"rule": run.settings.q, "exponent": 0.0, "note": reason}
    last_row = next(row for row in reversed(rows) if "exponent" in row)
    return {"rule": run.settings.q, **{name: last_row[name] for name in Choice._fields}}


def _train(run: Run, algorithm: Algorithm, prepared: Prepared) -> dict[str, Any]:
    """Train, save the model with its tokenizer, and return what it took for ``result.json``."""
    # Before the model: under ZeRO-3 it is loaded in shards, which these arguments switch on.
    args = ImportanceWeightedConfig(**training_arguments(run, algorithm))
    before = run.folder / TRAINED
    if before.exists():
        return json.loads(before.read_text())
    # transformers takes that of accelerate where its own settings name none, and else ignores it.
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", "bf16" if args.bf16 else "no"):
        other = ", or pass --precision bfloat16" if mixed == "bf16" else ""
        raise ValueError(
            f"accelerate's mixed_precision is {mixed}, and --precision {run.settings.precision}: "
            "drop it from accelerate's config and from the shell "
            f"(ACCELERATE_MIXED_PRECISION){other}"
        )
    # Rows are checked before the weights, which may take minutes to load.
    tokenizer = run.tokenizer(prepared)
    data, progress = curated_of(run, prepared, tokenizer), Progress(run)
    for problem in filter(None, (warmup_problem(run, data), _sync_problem(run, data))):
        if args.process_index == 0:
            runs.tell(f"{run}: {problem}")
    trainer = _trainer(run, args, prepared, tokenizer, data, progress)
    trainer.train(resume_from_checkpoint=last(run.folder / CHECKPOINTS))
    with written_aside(run.folder):
        trainer.save_model(str(run.folder / checkpoint.FOLDER))
        # PEFT's; the card of the run comes with its figures.
        (run.folder / checkpoint.FOLDER / "README.md").unlink(missing_ok=True)
    multiplicity = _multiplicity(data)
    trained: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "trajectories": int((multiplicity > 0).sum()),
        "draws_an_epoch": int(multiplicity.sum()),
        "proposal": args.proposal,
        "sync_every": args.sync_every,
        "ema_decay": args.ema_decay,
    }
    if run.settings.q is not None:
        trained["q"] = _last_choice(run, prepared, trainer.state.log_history)
    trainer.accelerator.free_memory()
    del trainer
    clear_device_cache(garbage_collection=True)
    trained |= progress.summary()
    if args.process_index == 0:
        write_json(before, trained)
        clipped = trained.get("clip_fraction", 0.0)
        if uses("max_weight", algorithm, run.settings) and clipped > _MOST_CLIPPED:
            runs.tell(
                f"{run}: --max-weight {run.settings.max_weight:g} made {clipped:.0%} of the "
                "weights equal, whatever the ESS; pass a larger one, or a smaller --temperature"
            )
    return trained
