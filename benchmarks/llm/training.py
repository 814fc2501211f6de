"""Training of one run: its rows, the trainer's settings, the trained model, what it cost."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from transformers import PrinterCallback, TrainerCallback

from benchmarks.llm.algorithms import Algorithm, choose_q
from benchmarks.llm.launch import Launch, assert_engine
from benchmarks.llm.models import load
from benchmarks.llm.options import LanguageRun
from benchmarks.llm.recipes import Prepared
from iwsft import checkpoint, metrics
from iwsft.curation import curate
from iwsft.datasets.text.tokens import CORRECT, SCORE
from iwsft.language import check_scores, correct_only, tokenize
from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.saving import last, written_aside
from iwsft.language.trainer import ImportanceWeightedTrainer
from iwsft.trajectory import MULTIPLICITY, TRAJ_IDS, lengths

CHECKPOINTS = "checkpoints"
# Takes updates so far, updates of the run, and a row of metrics.
OnProgress = Callable[[int, int, dict[str, float]], None]
# Rows that a run passes to it.
_SHOWN = 4
_COST = ("cpu_seconds", "wall_seconds")


def curated(
    run: LanguageRun, algorithm: Algorithm, prepared: Prepared, tokenizer: Any
) -> TensorDictBase:
    """Curate a recipe's rows into D+ (or D_Q+): packed trajectories with their multiplicity.

    Rows with a weight count as curated.

    Raises:
        ValueError: If rows can't be tokenised, none is left, or there are cuts and no scores or
            only equal ones.
    """
    settings = run.options.settings
    trajectories: TensorDictBase = tokenize(
        prepared.rows, tokenizer, max_length=settings.max_length
    ).trajectories
    if trajectories.get(CORRECT, default=None) is not None:
        trajectories = correct_only(trajectories)
    if trajectories.get(MULTIPLICITY, default=None) is not None:
        return trajectories
    cuts = algorithm.cuts(settings)
    if cuts:
        check_scores(prepared.rows)
    # Without a cut no score is looked at.
    scored = trajectories.get(SCORE, default=None) is not None
    score = SCORE if cuts or scored else "length"
    return curate(trajectories, cuts=cuts, score=score, seed=run.seed)


def training_arguments(
    run: LanguageRun, algorithm: Algorithm, launch: Launch | None
) -> dict[str, Any]:
    """Make the arguments of ``ImportanceWeightedConfig``.

    Raises:
        ValueError: If a batch can't be shared out over processes and micro-batches.
    """
    options, settings = run.options, run.options.settings
    processes = 1 if launch is None else launch.processes
    micro, accumulation = _shares(settings.batch_size, settings.micro_batch_size, processes)
    proposal, sync_every = choose_q(algorithm, settings, accumulation * processes)
    on_cpu = (options.own_device if launch is None else launch.device) == "cpu"
    return {
        "output_dir": str(run.folder / CHECKPOINTS),
        "proposal": proposal,
        "sync_every": sync_every,
        "ema_decay": settings.ema_decay if proposal == "lagged" else None,
        "length_normalize": settings.length_normalize,
        "layout": settings.layout,
        "reference_cache": str(run.shared_folder / "reference"),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
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
        "run_name": f"{run.dataset} {run}",
        "disable_tqdm": True,
    }


def _shares(batch: int, micro: int | None, processes: int) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches of a process in an update."""
    if batch % processes:
        raise ValueError(
            f"--batch-size {batch} can't be shared out over {processes} processes; take a multiple "
            f"of {processes}"
        )
    own = batch // processes
    micro = own if micro is None else min(micro, own)
    if own % micro:
        raise ValueError(
            f"--micro-batch-size {micro} does not divide the {own} draws of a process in an update "
            f"(--batch-size {batch}, {processes} processes)"
        )
    return micro, own // micro


def train(
    run: LanguageRun,
    algorithm: Algorithm,
    prepared: Prepared,
    on_progress: OnProgress,
    launch: Launch | None,
    *,
    writes: bool,
) -> dict[str, Any]:
    """Train, save the model with its tokenizer, and return what it took for ``result.json``.

    Args:
        run: The run.
        algorithm: The run's algorithm.
        prepared: Model and rows.
        on_progress: Takes updates so far, updates of the run, and a row of metrics, now and then.
        launch: What this process was started as, where it is one of several.
        writes: Whether this process writes the metrics; of several, one does.
    """
    # Before the model: under ZeRO-3 it is loaded in shards, which these arguments switch on.
    args = ImportanceWeightedConfig(**training_arguments(run, algorithm, launch))
    # DeepSpeed keeps float32 weights of its own.
    half = args.bf16 and launch is not None and launch.engine == "deepspeed"
    model, tokenizer = load(
        prepared.model,
        cache=run.shared_folder,
        **{"dtype": torch.bfloat16 if half else torch.float32, **prepared.load_kwargs},
    )
    if "pad_token" in prepared.notes:
        tokenizer.pad_token = prepared.notes["pad_token"]
    data = curated(run, algorithm, prepared, tokenizer)
    progress = Progress(run.folder, on_progress, writes=writes)
    trainer = ImportanceWeightedTrainer(
        model,
        args,
        trajectories=data,
        importance_weights=algorithm.weights(run.options.settings),
        processing_class=tokenizer,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    if launch is not None:
        assert_engine(trainer, launch)
    try:
        trainer.train(resume_from_checkpoint=last(run.folder / CHECKPOINTS))
    finally:
        progress.close()
    with written_aside(run.folder):
        trainer.save_model(str(run.folder / checkpoint.FOLDER))
    multiplicity = data.get(MULTIPLICITY)[lengths(data).cumsum(0) - 1]
    trained = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "trajectories": len(data.get(TRAJ_IDS).unique()),
        "draws_an_epoch": int(multiplicity.sum()),
        "proposal": args.proposal,
        "sync_every": args.sync_every,
        "ema_decay": args.ema_decay,
    }
    trainer.accelerator.free_memory()
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**trained, **(_metrics_summary(run.folder) if writes else {})}


def _metrics_summary(folder: Path) -> dict[str, float]:
    """Means, extremes and cost from the rows of the metrics."""
    rows = metrics.read(folder / metrics.FILE)
    start = {name: value for name, value in rows[0].items() if name != "step"}
    logged = [row for row in rows if "loss" in row]
    if not logged:
        return start
    ess = [row["ESS"] for row in logged]
    return {
        **start,
        "ESS": sum(ess) / len(ess),
        "ESS_min": min(ess),
        "weight_max": max(row["weight_max"] for row in logged),
        "cpu_seconds": logged[-1]["cpu_seconds"],
        "wall_seconds": logged[-1]["wall_seconds"],
    }


class Progress(TrainerCallback):
    """Writes the rows of ``metrics.jsonl``, with the seconds that were spent up to each.

    Row 0 holds ``reference_cpu_seconds`` and ``reference_wall_seconds``: before the first update.
    Seconds of a run that was cut off count up to the checkpoint that it continues from.

    Args:
        folder: Folder of the run.
        on_progress: Takes a few of the rows.
        writes: Whether this process does all this; of several, one does.
    """

    def __init__(self, folder: Path, on_progress: OnProgress, *, writes: bool) -> None:
        self._folder = folder
        self._on_progress = on_progress
        self._writes = writes
        self._log: metrics.MetricsLog | None = None
        self._since = (0.0, 0.0)
        self._before = (0.0, 0.0)
        self._shown = 0
        self._started = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the metrics back to the checkpoint."""
        self._since = _now()
        if not self._writes:
            return
        step = state.global_step
        # From the start a run writes row 0 again.
        self._log = metrics.MetricsLog(self._folder, after=step if step else -1)
        if step:
            rows = [row for row in metrics.read(self._folder / metrics.FILE) if _COST[0] in row]
            if rows:
                self._before = rows[-1][_COST[0]], rows[-1][_COST[1]]
            self._shown = step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the cost of the reference, which the trainer computes before the first epoch."""
        if self._started:
            return
        self._started = True
        cost, self._since = self._spent(), _now()
        if state.global_step == 0 and self._log is not None:
            names = (f"reference_{name}" for name in _COST)
            self._log.write({"step": 0, **dict(zip(names, cost, strict=True))})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a row."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs or self._log is None:
            return
        row = {"step": state.global_step, **logs, **dict(zip(_COST, self._spent(), strict=True))}
        self._log.write(row)
        step, steps = state.global_step, state.max_steps
        if step == steps or (step - self._shown) * _SHOWN >= steps:
            self._shown = step
            self._on_progress(step, steps, row)

    def close(self) -> None:
        """Close the files."""
        if self._log is not None:
            self._log.__exit__(None, None, None)

    def _spent(self) -> tuple[float, float]:
        cpu, wall = _now()
        return (
            self._before[0] + cpu - self._since[0],
            self._before[1] + wall - self._since[1],
        )


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()
