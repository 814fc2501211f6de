"""One run: a trained model, its test, its result.

Whatever a kill leaves of it is continued by the same call: training from its last checkpoint, and
all that comes after training is done again.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment  # type: ignore[import-untyped]
from tensordict import TensorDictBase
from transformers import PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from benchmarks.llm.algorithms import Algorithm, q_of
from benchmarks.llm.launch import Launch, assert_engine
from benchmarks.llm.models import load
from benchmarks.llm.plan import BENCHMARK, Plan
from benchmarks.llm.progress import Progress, Say
from benchmarks.llm.recipes.recipe import Prepared
from benchmarks.runs import RESULT, alone_in, write_json
from iwsft import checkpoint, metrics
from iwsft.curation import curate
from iwsft.datasets.text.tokens import CORRECT, SCORE
from iwsft.language import check_scores, correct_only, tokenize
from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.saving import last, written_aside
from iwsft.language.trainer import ImportanceWeightedTrainer
from iwsft.trajectory import MULTIPLICITY, TRAJ_IDS, lengths

CHECKPOINTS = "checkpoints"
# Others wait for the process that tests, however long it takes.
_PATIENCE = 7 * 24 * 3600


def run(plan: Plan, say: Say, launch: Launch | None = None) -> dict[str, Any] | None:
    """Train and test one seed; its folder must be claimed.

    Args:
        plan: of the run.
        say: told how it goes.
        launch: what this process is one of, where it is one of several.

    Returns:
        The content of ``result.json``; None in all but the first of several processes.

    Raises:
        FileExistsError: another process works in the folder.
    """
    # transformers' bars of every load and every note on padding.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # DeepSpeed calls torch by names of yesterday, at each gather.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if launch is None and plan.device == "cpu":
        torch.set_num_threads(plan.threads)
    first = _rank() == 0
    with alone_in(plan.folder, wait=False) if first else nullcontext():
        return _run(plan, say, launch, first)


def _run(plan: Plan, say: Say, launch: Launch | None, first: bool) -> dict[str, Any] | None:
    with _alone():
        prepared = plan.prepare()
    trained: dict[str, Any] = {"steps": 0}
    model = prepared.model
    result: dict[str, Any] | None = None
    if plan.algorithm is not None:
        trained = _train(plan, plan.algorithm, prepared, say, launch, first)
        model = str(plan.folder / checkpoint.FOLDER)
    together = plan.algorithm is not None and launch is not None and launch.processes > 1
    # Made by all together, before one goes its own way.
    group = _patient() if together else None
    if first:
        since = time.process_time(), time.perf_counter()
        score = dict(_evaluate(plan, prepared, model, launch))
        cost = time.process_time() - since[0], time.perf_counter() - since[1]
        trained["cpu_seconds"] = trained.get("cpu_seconds", 0.0) + cost[0]
        trained["wall_seconds"] = trained.get("wall_seconds", 0.0) + cost[1]
        result = {
            "benchmark": BENCHMARK,
            "dataset": plan.recipe,
            "algo": plan.algo,
            "seed": plan.seed,
            "score_name": prepared.score_name,
            **score,
            **trained,
            "evaluation_cpu_seconds": cost[0],
            "engine": "single" if launch is None else launch.engine_name,
            "processes": 1 if launch is None else launch.processes,
            "notes": dict(prepared.notes),
        }
        write_json(plan.folder / RESULT, result)
    if together:
        torch.distributed.barrier(group=group)
    return result


def curated(plan: Plan, algorithm: Algorithm, prepared: Prepared, tokenizer: Any) -> TensorDictBase:
    """D+ (or D_Q+) of a recipe's rows: packed trajectories with their multiplicity.

    Rows with a weight count as curated.

    Raises:
        ValueError: rows that can't be tokenised, or of which none is left; cuts, and rows without
            scores or whose scores are all equal.
    """
    settings = plan.settings
    found: TensorDictBase = tokenize(
        prepared.rows, tokenizer, max_length=settings.max_length
    ).trajectories
    if found.get(CORRECT, default=None) is not None:
        found = correct_only(found)
    if found.get(MULTIPLICITY, default=None) is not None:
        return found
    cuts = algorithm.cuts(settings)
    if cuts:
        check_scores(prepared.rows)
    # Without a cut no score is looked at.
    scored = found.get(SCORE, default=None) is not None
    score = SCORE if cuts or scored else "length"
    return curate(found, cuts=cuts, score=score, seed=plan.seed)


def arguments_of(plan: Plan, algorithm: Algorithm, launch: Launch | None) -> dict[str, Any]:
    """Settings of the trainer.

    Raises:
        ValueError: a batch that can't be shared out over processes and micro-batches.
    """
    settings = plan.settings
    processes = 1 if launch is None else launch.processes
    micro, accumulation = _shares(settings.batch_size, settings.micro_batch_size, processes)
    proposal, sync_every = q_of(algorithm, settings, accumulation * processes)
    on_cpu = (plan.device if launch is None else launch.device) == "cpu"
    return {
        "output_dir": str(plan.folder / CHECKPOINTS),
        "proposal": proposal,
        "sync_every": sync_every,
        "ema_decay": settings.ema_decay if proposal == "lagged" else None,
        "length_normalize": settings.length_normalize,
        "layout": settings.layout,
        "reference_cache": str(plan.kept / "reference"),
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
        "seed": plan.seed,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "logging_steps": plan.log_every,
        "save_strategy": "steps",
        "save_steps": plan.save_every or 0.2,
        "save_total_limit": 1,
        "report_to": list(plan.report_to),
        "run_name": f"{plan.recipe} {plan}",
        "disable_tqdm": True,
    }


def _shares(batch: int, micro: int | None, processes: int) -> tuple[int, int]:
    """Draws of a micro-batch, and micro-batches of a process in an update."""
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
    plan: Plan,
    algorithm: Algorithm,
    prepared: Prepared,
    say: Say,
    launch: Launch | None,
    first: bool,
) -> dict[str, Any]:
    """Train, save the model with its tokenizer, and say what it took."""
    # Before the model: under ZeRO-3 it is loaded in shards, which these arguments switch on.
    args = ImportanceWeightedConfig(**arguments_of(plan, algorithm, launch))
    # DeepSpeed keeps float32 weights of its own.
    half = args.bf16 and launch is not None and launch.engine == "deepspeed"
    model, tokenizer = load(
        prepared.model,
        cache=plan.kept,
        **{"dtype": torch.bfloat16 if half else torch.float32, **prepared.load_kwargs},
    )
    if "pad_token" in prepared.notes:
        tokenizer.pad_token = prepared.notes["pad_token"]
    data = curated(plan, algorithm, prepared, tokenizer)
    progress = Progress(plan.folder, say, writes=first)
    trainer = ImportanceWeightedTrainer(
        model,
        args,
        trajectories=data,
        importance_weights=algorithm.weights(plan.settings),
        processing_class=tokenizer,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    if launch is not None:
        assert_engine(trainer, launch)
    try:
        trainer.train(resume_from_checkpoint=last(plan.folder / CHECKPOINTS))
    finally:
        progress.close()
    with written_aside(plan.folder):
        trainer.save_model(str(plan.folder / checkpoint.FOLDER))
    sizes = lengths(data)
    draws = data.get(MULTIPLICITY)[sizes.cumsum(0) - 1]
    found = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "trajectories": len(data.get(TRAJ_IDS).unique()),
        "draws_an_epoch": int(draws.sum()),
        "proposal": args.proposal,
        "sync_every": args.sync_every,
        "ema_decay": args.ema_decay,
    }
    trainer.accelerator.free_memory()
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**found, **(_measured(plan.folder) if first else {})}


def _measured(folder: Path) -> dict[str, float]:
    """What the rows of the metrics come to."""
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


def _evaluate(plan: Plan, prepared: Prepared, model: str, launch: Launch | None) -> Any:
    """Test a model as it is saved, in one process."""
    device = plan.device if launch is None else launch.device
    spread = launch is not None and device == "cuda"
    with _alone():
        found, tokenizer = load(
            model,
            cache=plan.kept,
            **{**prepared.load_kwargs, **({"device_map": "auto"} if spread else {})},
        )
        tested: Any = found
        if not spread:
            tested.to(device)
        return plan.load().evaluate(tested.eval(), tokenizer, prepared, seed=plan.seed)


@contextmanager
def _alone() -> Iterator[None]:
    """Make transformers load and generate as in one process: not in shards and in step.

    The engine's settings of the run before would hold otherwise. The next run's
    ``TrainingArguments`` set them again.
    """
    unset_hf_deepspeed_config()
    # By FSDP's setting only the first process would have the weights.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        yield


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


@lru_cache(maxsize=1)
def _patient() -> Any:
    """A process group whose barriers wait."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE))
