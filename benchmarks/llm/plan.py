"""What a run is: its settings, its folder, and what stands in its ``config.json``."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.llm.algorithms import ALGORITHMS, BASE, Algorithm
from benchmarks.llm.kept import file_sha256
from benchmarks.llm.launch import Launch
from benchmarks.llm.recipes import Recipe, load_recipe
from benchmarks.llm.recipes.recipe import Defaults, Prepared
from benchmarks.runs import hardware, versions

BENCHMARK = "llm"
_PACKAGES = ("torch", "tensordict", "torchrl", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class Plan:
    """Everything a run hangs on; plain values. See ``benchmarks.llm.arguments.Arguments``.

    Attributes:
        trust_remote_code: run code that comes with the model.
        threads: of torch, where the run is one process on the CPU.
    """

    recipe: str
    algo: str
    seed: int
    settings: Defaults
    model: str | None
    trust_remote_code: bool
    data: str | None
    device: str
    threads: int
    log_every: int
    save_every: int | None
    report_to: tuple[str, ...]
    out: str

    def __str__(self) -> str:
        return f"{self.algo} seed {self.seed}"

    @property
    def algorithm(self) -> Algorithm | None:
        """What the name stands for; None for the base, which is not trained."""
        return None if self.algo == BASE else ALGORITHMS[self.algo]

    @property
    def recipe_folder(self) -> Path:
        """Of all runs of the recipe."""
        return Path(self.out) / BENCHMARK / self.recipe

    @property
    def kept(self) -> Path:
        """What runs share: base models, rows, reference log-probs."""
        return self.recipe_folder / "prepared"

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.recipe_folder / self.algo / f"seed-{self.seed}"

    def load(self) -> Recipe:
        """The recipe."""
        return load_recipe(self.recipe)

    def prepare(self) -> Prepared:
        """Model and rows, made where they are not kept yet."""
        found = self.load().prepare(self.kept, seed=self.seed, model=self.model, data=self.data)
        if not self.trust_remote_code:
            return found
        return replace(found, load_kwargs={**found.load_kwargs, "trust_remote_code": True})


def settings_of(plan: Plan) -> dict[str, Any]:
    """The values that decide the numbers: what a run to be resumed must agree with."""
    found: dict[str, Any] = {
        "recipe": plan.recipe,
        "algo": plan.algo,
        "seed": plan.seed,
        "model": plan.model,
        "data": plan.data,
    }
    file = None if plan.data is None else Path(plan.data).expanduser()
    if file is not None and file.is_file():
        found["data_sha256"] = file_sha256(file)
    return found if plan.algorithm is None else {**found, "training": asdict(plan.settings)}


def config_of(plan: Plan, launch: Launch | None) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {
        "benchmark": BENCHMARK,
        "dataset": plan.recipe,
        "algo": plan.algo,
        "seed": plan.seed,
        "settings": settings_of(plan),
        "engine": "single" if launch is None else launch.engine_name,
        "processes": 1 if launch is None else launch.processes,
        "versions": versions(_PACKAGES),
        "hardware": hardware(plan.device if launch is None else launch.device),
        "command": " ".join(["python -m benchmarks.llm", *sys.argv[1:]]),
    }
