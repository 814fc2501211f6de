"""Settings and models that an evaluation refuses before it generates anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_evaluation import settings

from benchmarks.llm.evaluation.run import run
from benchmarks.stopping import expected


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"tasks": ("math",)}, "unknown task 'math'; did you mean 'math-500'"),
        ({"tasks": ()}, "pass at least one value to --tasks"),
        ({"tasks": ("gsm8k=nowhere.jsonl",)}, "there is no file nowhere.jsonl"),
        ({"tasks": ("gsm8k={}/gsm8k.jsonl",) * 2}, "asked for twice; name each once"),
        ({"n": 0}, "--n 0: at least 1"),
        ({"n": 4}, "--n 4: --temperature 0 gives the same answer each time"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"top_p": 0.0, "temperature": 1.0}, "--top-p 0.0"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"seed": -1}, "--seed -1: a seed lies in"),
        ({"seed": 2**64}, "--seed 18446744073709551616: a seed lies in"),
        ({"top_p": 0.5}, "--top-p 0.5 changes nothing with --temperature 0"),
        ({"think_format": "tags"}, "--think-format tags changes nothing without --think-budget"),
        ({"backend": "vllm", "device": "auto"}, "--device auto changes nothing with --backend"),
        ({"waits": 1}, "--waits 1 changes nothing without --think-budget"),
        ({"think_budget": 0}, "--think-budget 0"),
        (
            {"think_budget": 9, "think_format": "tags"},
            "'</think>', the end of thinking, is not a token of this model",
        ),
        (
            {"max_tokens": 690},
            r"question \d has \d+ tokens, and 690 new ones do not fit in the .* context of 700",
        ),
        ({"think_budget": 600}, "lower --max-tokens or --think-budget"),
        ({"device": "cuda:77"}, "--device cuda:77 can't be used here"),
    ],
)
def test_bad_settings(
    model: Path, data: Path, tmp_path: Path, others: dict[str, Any], message: str
) -> None:
    if "tasks" in others:
        others = {**others, "tasks": tuple(each.format(data) for each in others["tasks"])}
    with pytest.raises(expected(), match=message):
        options = settings(model, data, tmp_path, **others)
        options.check()
        run(options)
    assert not (tmp_path / "tiny" / "gsm8k" / "generations.jsonl").exists()


def test_bad_models(model: Path, data: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            run(settings(folder, data, tmp_path / "out"))
        assert "\n" not in str(error.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no model")
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    for path in bare.glob("*token*"):
        path.unlink()
    refused(bare, "bare has no tokenizer.*save_pretrained")
    weightless = Path(shutil.copytree(model, tmp_path / "weightless"))
    (weightless / "model.safetensors").unlink()
    refused(weightless, "weightless holds no model")
