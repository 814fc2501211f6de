"""Training and test of one run, and its ``result.json``.

Whatever a kill leaves of a run is continued by the same call: training from its last checkpoint,
and all that comes after training is done again.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment  # type: ignore[import-untyped]
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from benchmarks.llm.algorithms import Algorithm, choose_q
from benchmarks.llm.launch import Launch, assert_engine
from benchmarks.llm.models import load
from benchmarks.llm.recipes import Prepared, load_recipe
from benchmarks.llm.run import Run, curated, engine_of, identity_of, prepare
from benchmarks.runs import RESULT, alone_in, write_json
from iwsft import checkpoint, metrics
from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.saving import last, written_aside
from iwsft.language.trainer import ImportanceWeightedTrainer
from iwsft.trajectory import MULTIPLICITY, TRAJ_IDS, lengths

CHECKPOINTS = "checkpoints"
# Settings that are arguments of the trainer as they are.
_SAME_NAME = (
    "length_normalize",
    "layout",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
)
# Takes updates so far, updates of the run, and a row of metrics.
Report = Callable[[int, int, dict[str, float]], None]
# Number of rows that a run reports.
_REPORTED = 4
_COST = ("cpu_seconds", "wall_seconds")
# Others wait for the process that tests, however long it takes.
_PATIENCE = timedelta(days=7)


def train_and_score(
    run: Run, report: Report, launch: Launch | None = None
) -> dict[str, Any] | None:
    """Train and test one run; its folder must be claimed.

    Args:
        run: The run.
        report: Takes updates so far, updates of the run, and a row of metrics, now and then.
        launch: What this process was started as, where it is one of several.

    Returns:
        The content of ``result.json``; None in all but the first of several processes.

    Raises:
        FileExistsError: If another process works in the folder.
    """
    # transformers' bars of every load and every note on padding.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # DeepSpeed calls torch by deprecated names at each gather.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    first = int(os.environ.get("RANK", 0)) == 0
    with alone_in(run.folder, wait=False) if first else nullcontext():
        with _in_one_process():
            prepared = prepare(run)
        trained: dict[str, Any] = {"steps": 0}
        model = prepared.model
        if run.algorithm is not None:
            trained = _train(run, run.algorithm, prepared, report, launch, writes=first)
            model = str(run.folder / checkpoint.FOLDER)
        together = run.algorithm is not None and launch is not None and launch.processes > 1
        # All make it together, before one tests alone.
        group = _patient_group() if together else None
        result = _test(run, prepared, model, trained, launch) if first else None
        if together:
            torch.distributed.barrier(group=group)
    return result


def _test(
    run: Run, prepared: Prepared, model: str, trained: dict[str, Any], launch: Launch | None
) -> dict[str, Any]:
    """Test a model and write ``result.json``."""
    cpu, wall = time.process_time(), time.perf_counter()
    score = dict(_evaluate(run, prepared, model, launch))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    result = {
        **identity_of(run),
        "score_name": prepared.score_name,
        **score,
        **trained,
        "cpu_seconds": trained.get("cpu_seconds", 0.0) + cpu,
        "wall_seconds": trained.get("wall_seconds", 0.0) + wall,
        "evaluation_cpu_seconds": cpu,
        **engine_of(launch),
        "notes": dict(prepared.notes),
    }
    write_json(run.folder / RESULT, result)
    return result


def _evaluate(run: Run, prepared: Prepared, model: str, launch: Launch | None) -> Any:
    """Test a model as it is saved, in one process."""
    device = run.options.own_device if launch is None else launch.device
    spread = {"device_map": "auto"} if launch is not None and device == "cuda" else {}
    with _in_one_process():
        loaded, tokenizer = load(
            model, cache=run.shared_folder, **{**prepared.load_kwargs, **spread}
        )
        tested: Any = loaded
        if not spread:
            tested.to(device)
        return load_recipe(run.dataset).evaluate(tested.eval(), tokenizer, prepared, seed=run.seed)


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Make transformers load and generate as in one process: not in shards and in step.

    The engine's settings of the run before would hold otherwise. The next run's
    ``TrainingArguments`` set them again.
    """
    unset_hf_deepspeed_config()
    # By FSDP's setting only the first process would have the weights.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        yield


@lru_cache(maxsize=1)
def _patient_group() -> Any:
    """A process group whose barriers wait."""
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


def training_arguments(run: Run, algorithm: Algorithm, launch: Launch | None) -> dict[str, Any]:
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
        "reference_cache": str(run.shared_folder / "reference"),
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


def _train(
    run: Run,
    algorithm: Algorithm,
    prepared: Prepared,
    report: Report,
    launch: Launch | None,
    *,
    writes: bool,
) -> dict[str, Any]:
    """Train, save the model with its tokenizer, and return what it took for ``result.json``.

    Args:
        run: The run.
        algorithm: The run's algorithm.
        prepared: Model and rows.
        report: Takes updates so far, updates of the run, and a row of metrics, now and then.
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
    progress = Progress(run.folder, report, writes=writes)
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
        assert_engine(trainer.accelerator, launch)
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
        report: Takes a few of the rows.
        writes: Whether this process does all this; of several, one does.
    """

    def __init__(self, folder: Path, report: Report, *, writes: bool) -> None:
        self._folder = folder
        self._report = report
        self._writes = writes
        self._log: metrics.MetricsLog | None = None
        self._since = (0.0, 0.0)
        self._before = (0.0, 0.0)
        self._reported = 0
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
            self._reported = step

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
        if step == steps or (step - self._reported) * _REPORTED >= steps:
            self._reported = step
            self._report(step, steps, row)

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
