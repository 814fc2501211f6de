"""A run of a language model: its algorithm, its rows, and its ``config.json``."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from transformers import PreTrainedModel

from benchmarks import runs
from benchmarks.llm.algorithms import ALGORITHMS, BASE, Algorithm
from benchmarks.llm.kept import file_sha256
from benchmarks.llm.launch import Launch
from benchmarks.llm.models import load
from benchmarks.llm.options import Options
from benchmarks.llm.recipes import Prepared, load_recipe
from benchmarks.runs import hardware, versions
from iwsft.curation import curate
from iwsft.datasets.text.tokens import CORRECT, SCORE
from iwsft.language import check_scores, correct_only, tokenize
from iwsft.trajectory import MULTIPLICITY


@dataclass(frozen=True)
class Run(runs.Run[Options]):
    """A run of a language model: its dataset is the recipe, ``launch`` the processes it runs in."""

    benchmark = "llm"
    launch: Launch

    @property
    def algorithm(self) -> Algorithm | None:
        """The algorithm; None for the base, which is not trained."""
        return None if self.algo == BASE else ALGORITHMS[self.algo]

    @property
    def shared_folder(self) -> Path:
        """Folder of what the runs of a recipe share: base models, rows, reference log-probs."""
        return self.dataset_folder / "prepared"

    def load(self, model: str, **options: Any) -> tuple[PreTrainedModel, Any]:
        """Load a model and its tokenizer, see :func:`benchmarks.llm.models.load`."""
        trusted = self.options.trust_remote_code
        return load(model, cache=self.shared_folder, trust_remote_code=trusted, **options)


def prepare(run: Run) -> Prepared:
    """Make model and rows, or find them in the cache that the runs of a recipe share."""
    return load_recipe(run.dataset).prepare(
        run.shared_folder, seed=run.seed, model=run.options.model, data=run.options.data
    )


def curated(run: Run, algorithm: Algorithm, prepared: Prepared, tokenizer: Any) -> TensorDictBase:
    """Curate a recipe's rows into D+ (or D_Q+): packed trajectories with their multiplicity.

    Rows with a multiplicity count as curated.
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


def config_of(run: Run) -> dict[str, Any]:
    """Describe a run for ``config.json``; a resumed run must agree in ``settings``."""
    options = run.options
    settings: dict[str, Any] = {
        "recipe": run.dataset,
        "algo": run.algo,
        "seed": run.seed,
        "model": options.model,
        "data": options.data,
    }
    if options.data is not None and (file := Path(options.data).expanduser()).is_file():
        settings["data_sha256"] = file_sha256(file)
    if run.algorithm is not None:
        settings["training"] = asdict(options.settings)
    return {
        **identity_of(run),
        "settings": settings,
        **engine_of(run),
        "versions": versions(
            ("torch", "tensordict", "torchrl", "transformers", "accelerate", "numpy")
        ),
        "hardware": hardware(run.launch.device),
        "command": " ".join(["python -m benchmarks.llm", *sys.argv[1:]]),
    }


def identity_of(run: Run) -> dict[str, Any]:
    """Return what names a run in ``config.json`` and ``result.json``."""
    names = ("benchmark", "dataset", "algo", "seed")
    return {name: getattr(run, name) for name in names}


def engine_of(run: Run) -> dict[str, Any]:
    """Return what trains, for ``config.json`` and ``result.json``."""
    return {"engine": run.launch.engine_name, "processes": run.launch.processes}
