"""One run: a trained model, its test, its result.

Whatever a kill leaves of it is continued by the same call: training from its last checkpoint, and
all that comes after training is done again.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment  # type: ignore[import-untyped]
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from benchmarks.llm.kept import file_sha256
from benchmarks.llm.launch import Launch
from benchmarks.llm.models import load
from benchmarks.llm.options import LanguageRun
from benchmarks.llm.recipes import Prepared, load_recipe
from benchmarks.llm.training import OnProgress, train
from benchmarks.runs import RESULT, alone_in, hardware, versions, write_json
from iwsft import checkpoint

_PACKAGES = ("torch", "tensordict", "torchrl", "transformers", "accelerate", "numpy")
# Others wait for the process that tests, however long it takes.
_PATIENCE = timedelta(days=7)


def config_of(run: LanguageRun, launch: Launch | None) -> dict[str, Any]:
    """Describe a run for ``config.json``; a resumed run must agree in ``settings``."""
    options = run.options
    settings: dict[str, Any] = {
        "recipe": run.dataset,
        "algo": run.algo,
        "seed": run.seed,
        "model": options.model,
        "data": options.data,
    }
    file = None if options.data is None else Path(options.data).expanduser()
    if file is not None and file.is_file():
        settings["data_sha256"] = file_sha256(file)
    if run.algorithm is not None:
        settings["training"] = asdict(options.settings)
    return {
        **_identity(run),
        "settings": settings,
        **_engine(launch),
        "versions": versions(_PACKAGES),
        "hardware": hardware(options.own_device if launch is None else launch.device),
        "command": " ".join(["python -m benchmarks.llm", *sys.argv[1:]]),
    }


def _identity(run: LanguageRun) -> dict[str, Any]:
    return {
        "benchmark": run.benchmark,
        "dataset": run.dataset,
        "algo": run.algo,
        "seed": run.seed,
    }


def _engine(launch: Launch | None) -> dict[str, Any]:
    if launch is None:
        return {"engine": "single", "processes": 1}
    return {"engine": launch.engine_name, "processes": launch.processes}


def prepare(run: LanguageRun) -> Prepared:
    """Make model and rows, or find them in the cache that the runs of a recipe share."""
    options = run.options
    prepared = load_recipe(run.dataset).prepare(
        run.shared_folder, seed=run.seed, model=options.model, data=options.data
    )
    if not options.trust_remote_code:
        return prepared
    return replace(prepared, load_kwargs={**prepared.load_kwargs, "trust_remote_code": True})


def train_and_test(
    run: LanguageRun, on_progress: OnProgress, launch: Launch | None = None
) -> dict[str, Any] | None:
    """Train and test one run; its folder must be claimed.

    Args:
        run: The run.
        on_progress: Takes updates so far, updates of the run, and a row of metrics, now and then.
        launch: What this process was started as, where it is one of several.

    Returns:
        The content of ``result.json``; None in all but the first of several processes.

    Raises:
        FileExistsError: If another process works in the folder.
    """
    # transformers' bars of every load and every note on padding.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # DeepSpeed calls torch by names of yesterday, at each gather.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    first = int(os.environ.get("RANK", 0)) == 0
    with alone_in(run.folder, wait=False) if first else nullcontext():
        with _in_one_process():
            prepared = prepare(run)
        trained: dict[str, Any] = {"steps": 0}
        model = prepared.model
        if run.algorithm is not None:
            trained = train(run, run.algorithm, prepared, on_progress, launch, writes=first)
            model = str(run.folder / checkpoint.FOLDER)
        together = run.algorithm is not None and launch is not None and launch.processes > 1
        # All make it together, before one tests alone.
        group = _patient_group() if together else None
        result = _test(run, prepared, model, trained, launch) if first else None
        if together:
            torch.distributed.barrier(group=group)
    return result


def _test(
    run: LanguageRun, prepared: Prepared, model: str, trained: dict[str, Any], launch: Launch | None
) -> dict[str, Any]:
    """Test a model and write ``result.json``."""
    cpu, wall = time.process_time(), time.perf_counter()
    score = dict(_evaluate(run, prepared, model, launch))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    result = {
        **_identity(run),
        "score_name": prepared.score_name,
        **score,
        **trained,
        "cpu_seconds": trained.get("cpu_seconds", 0.0) + cpu,
        "wall_seconds": trained.get("wall_seconds", 0.0) + wall,
        "evaluation_cpu_seconds": cpu,
        **_engine(launch),
        "notes": dict(prepared.notes),
    }
    write_json(run.folder / RESULT, result)
    return result


def _evaluate(run: LanguageRun, prepared: Prepared, model: str, launch: Launch | None) -> Any:
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
