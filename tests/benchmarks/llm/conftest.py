"""Small models as folders, models that come with their own code, and what a small loop needs."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_evaluation
import small_job
import small_loop
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.llm.__main__ import loop
from iwsft.loop import table
from tests.tiny_qwen2 import write


@pytest.fixture(scope="module", autouse=True)
def younger_objects() -> None:
    """Leave what earlier modules keep out of the collections that each training runs in full."""
    gc.freeze()


@pytest.fixture
def figures() -> None:
    """For tests that want the figures of a report, which take a third of a small job."""


@pytest.fixture(autouse=True)
def without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures for tests that do not look at them."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("benchmarks.report.language.draw_recipe", lambda recipe: {})


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, ChatML, and the tokens of Qwen2.5 that recipes ask for."""
    return write(tmp_path_factory.mktemp("tiny-qwen2"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Model and rows of the small job."""
    return small_job.write(tmp_path_factory.mktemp("small"))


@pytest.fixture
def bring_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """``bring_code(folder)``: the Qwen2 model there comes with code; the folder it makes if run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    # Loading sets these, and then all models of the class are saved with code.
    for kind in (Qwen2Config, Qwen2ForCausalLM):
        monkeypatch.setattr(kind, "_auto_class", kind._auto_class)
    mark = tmp_path / "ran"

    def bring(folder: Path) -> Path:
        (folder / "own.py").write_text(
            f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n"
            "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
            "class OwnConfig(Qwen2Config):\n    model_type = 'own_kind'\n"
            "class Own(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
        )
        config = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
        config |= {"model_type": "own_kind", "auto_map": names}
        (folder / "config.json").write_text(json.dumps(config))
        return mark

    return bring


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of an evaluation."""
    return small_evaluation.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the questions of an evaluation."""
    folder = tmp_path_factory.mktemp("data")
    small_evaluation.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of random weights, prompts, and a module of verifiers, for a loop."""
    folder = tmp_path_factory.mktemp("loop")
    small_loop.make(folder)
    return folder


@pytest.fixture
def run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """``run(flag, ...)``: the command in a folder of its own; its table."""
    monkeypatch.syspath_prepend(place)

    def call(*flags: str, out: str = "loop", verifier: str = "parity") -> list[dict[str, Any]]:
        words = small_loop.words_of(place, verifier)
        pairs = zip(words[::2], words[1::2], strict=True)
        own = [word for pair in pairs if pair[0] not in flags for word in pair]
        loop([*own, "--out", str(tmp_path / out), *flags])
        return table(tmp_path / out)

    return call
