"""The card of a fine-tuned model: how it was made, its figures, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.constants import REPOCARD_NAME

from benchmarks.llm.models import split_commit
from benchmarks.llm.options import ALGORITHMS, BASE
from benchmarks.report.changes import change_line
from benchmarks.runs import CONFIG, RESULT
from iwsft import checkpoint
from iwsft.files import write

_Numbers = Mapping[str, Any]
# What q is, by the name of the proposal.
_Q = {
    "reference": "pi_ref: every importance weight is 1",
    "current": "the policy itself",
    "cached": "the policy at the last hard sync",
    "lagged": "a moving average of the policy",
}


def write_card(run: Path) -> Path | None:
    """Write the card of a finished run's model, unless it has one, and return its place."""
    card = run / checkpoint.FOLDER / REPOCARD_NAME
    if card.exists() or not card.parent.is_dir() or not (run / RESULT).is_file():
        return None
    config, result = (json.loads((run / name).read_text()) for name in (CONFIG, RESULT))
    base = _base_of(run.parents[1], config)
    text = "\n".join(
        _lines(config, result, base, adapters=(card.parent / "adapter_config.json").is_file())
    )
    write(card, text + "\n")
    return card


def _base_of(recipe: Path, config: _Numbers) -> _Numbers | None:
    """The result of the base on the same model and rows, if it was tested."""
    own = {"algo", "seed", "training"}
    for result in sorted((recipe / BASE).glob(f"*/{RESULT}")):
        known = result.with_name(CONFIG)
        settings = json.loads(known.read_text())["settings"] if known.is_file() else {}
        if all(
            settings.get(name) == config["settings"].get(name)
            for name in {*settings, *config["settings"]} - own
        ):
            base: _Numbers = json.loads(result.read_text())
            return base
    return None


def _lines(
    config: _Numbers, result: _Numbers, base: _Numbers | None, *, adapters: bool
) -> Iterator[str]:
    settings = config["settings"]
    training, algo = settings["training"], settings["algo"]
    # The loop names it with its commit.
    named = split_commit(settings["model"])[0] if "model" in settings else None
    model = named or f"the model of the recipe {settings['recipe']}"
    data = settings.get("data") or f"the data of the recipe {settings['recipe']}"
    head = ModelCardData(
        # The hub takes no paths.
        base_model=None if Path(model).expanduser().exists() else named,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        tags=["iwsft", algo],
    )
    yield f"---\n{head.to_yaml()}\n---\n"
    yield f"# {model}, fine-tuned by {algo}\n"
    yield "## How it was made\n"
    curated = "D_Q+, in which better rows count several times" if ALGORITHMS[algo].quality else "D+"
    curated = "right and wrong answers" if ALGORITHMS[algo].signed else curated
    commits = [settings.get(f"{name}_commit") for name in ("model", "data")]
    of_model, of_data = (f" at commit {commit}" if commit else "" for commit in commits)
    yield f"- Model: `{model}`{of_model}{', with LoRA adapters' if adapters else ''}"
    yield f"- Data: `{data}`{of_data}; rows: {result['trajectories']}, {curated}"
    yield f"- Algorithm: {algo}, q is {_Q[result['proposal']]}"
    updates = "update" if result["steps"] == 1 else "updates"
    yield (
        f"- Training: {result['steps']} {updates} of {training['batch_size']} rows, learning rate "
        f"{training['learning_rate']:g}, seed {settings['seed']}"
    )
    yield f"- Command: `{config['command']}`"
    versions = ", ".join(f"{name} {number}" for name, number in config["versions"].items())
    yield f"- Versions: {versions}\n"
    yield from _figures(result, base)
    yield "\n## How to load it\n"
    yield (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )
    if adapters:
        yield "\nThe folder holds the adapters alone; `peft` loads them onto the model."


def _figures(result: _Numbers, base: _Numbers | None) -> Iterator[str]:
    yield "## Figures\n"
    yield f"Score: {result['score_name']}. Intervals are 95 %.\n"
    yield "| | before | after |\n|---|---|---|"
    for name, label in (("score", "score"), ("log_prob", "log-likelihood of a token")):
        if name in result:
            yield f"| {label} | {_figure(base, name)} | {_figure(result, name)} |"
    if changed := change_line(result, base):
        yield f"\nPaired over the prompts: {changed}."
    if "ESS" in result:
        yield (
            f"\nThe effective share of an update's draws was {result['ESS']:.2f} on average and "
            f"{result['ESS_min']:.2f} at least, the largest weight {result['weight_max']:.2f}."
        )


def _figure(result: _Numbers | None, name: str) -> str:
    if result is None or name not in result:
        return "not measured"
    interval = result["interval" if name == "score" else f"{name}_interval"]
    ends = "no interval" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return f"{result[name]:.3f} ({ends})"
