"""The TRL example runs as a user runs it, and its trainer gives the updates of a plain loop."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.nn.functional import log_softmax

pytest.importorskip("trl")
EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_sft.py"
# Two tokens each with the end, so that a mean over tokens is one over trajectories.
EQUAL = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (1, 2, 3, 4) for b in (2, 3)]
UNEQUAL = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (1, 4, 8, 9) for b in (2, 3)]
SETTINGS = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": len(EQUAL),
    "max_steps": 4,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
}


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture
def model(example: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return example["decoder"](len(example["tokenizer"]()))


def _trainer(example: dict[str, Any], folder: Path, rows: Any, model: Any, **own: Any) -> Any:
    of_trainer = {
        name: own.pop(name) for name in ("proposal", "eval_dataset", "peft_config") if name in own
    }
    kind = own.pop("kind", example["ImportanceWeightedSFTTrainer"])
    return kind(
        model=model,
        args=example["SFTConfig"](output_dir=str(folder), **{**SETTINGS, **own}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=example["tokenizer"](),
        **of_trainer,
    )


def _trained(*args: Any, **own: Any) -> list[dict[str, float]]:
    trainer = _trainer(*args, **own)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def _plain_loop(example: dict[str, Any], model: Any, *, weighted: bool) -> list[float]:
    """Full logits, a row at a time, the weight exp of the mean log-ratio, plain gradient steps."""
    words = example["tokenizer"]()

    def mean_log_prob(row: dict[str, str]) -> torch.Tensor:
        asked = words(row["prompt"])["input_ids"]
        ids = asked + words(row["completion"] + "<eos>")["input_ids"]
        log_prob = log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
        each = log_prob.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        return each[len(asked) - 1 :].mean()

    with torch.no_grad():
        reference = torch.stack([mean_log_prob(row) for row in UNEQUAL])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    found = []
    for _ in range(4):
        log_prob = torch.stack([mean_log_prob(row) for row in UNEQUAL])
        weight = (log_prob.detach() - reference).exp() if weighted else 1.0
        loss = -(weight * log_prob).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_it_runs_from_the_command_line() -> None:
    options = ["--rows=200", "--sft-updates=20", "--updates=30", "--batch-size=16"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, check=True
    )
    found = re.search(r"30 updates, loss (-?[\d.]+) -> (-?[\d.]+), ESS ([\d.]+)", done.stdout)
    assert found, done.stdout
    assert 0 < float(found[3]) <= 1


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("proposal", ["current", "reference"])
def test_updates_are_those_of_a_plain_loop(
    example: dict[str, Any], model: Any, tmp_path: Path, proposal: str, accumulation: int
) -> None:
    expected = _plain_loop(example, deepcopy(model), weighted=proposal == "current")
    found = _trained(
        example,
        tmp_path,
        UNEQUAL,
        model,
        proposal=proposal,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=len(UNEQUAL) // accumulation,
    )
    assert [row["loss"] for row in found] == pytest.approx(expected, rel=2e-5)
    assert found[-1]["log_prob"] > found[0]["log_prob"]
    if proposal == "current":
        assert found[0]["ESS"] == found[0]["weight_max"] == pytest.approx(1.0, abs=1e-5)
        assert found[-1]["ESS"] < 1 - 1e-4


def test_without_weights_it_is_trls_own_training(
    example: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    ours, theirs = (
        _trained(example, tmp_path / str(place), EQUAL, deepcopy(model), **own)
        for place, own in enumerate(({"proposal": "reference"}, {"kind": example["SFTTrainer"]}))
    )
    for row, other in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_evaluation_is_trls(example: dict[str, Any], model: Any, tmp_path: Path) -> None:
    found = [
        _trainer(
            example,
            tmp_path / str(place),
            EQUAL,
            deepcopy(model),
            eval_dataset=Dataset.from_list(UNEQUAL),
            kind=kind,
        ).evaluate()["eval_loss"]
        for place, kind in enumerate(
            (example["ImportanceWeightedSFTTrainer"], example["SFTTrainer"])
        )
    ]
    assert found[0] == found[1] > 0


def test_adapters_are_off_in_the_reference(
    example: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig

    before = deepcopy(model.state_dict())
    found = _trained(
        example,
        tmp_path,
        UNEQUAL,
        model,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    assert found[0]["kl_approx"] == pytest.approx(0.0, abs=1e-5)
    # Not the loss: it grows with the weights.
    assert found[-1]["log_prob"] > found[0]["log_prob"]
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


def test_rows_that_are_not_trajectories_are_refused(
    example: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="one trajectory: set packing"):
        _trainer(example, tmp_path, EQUAL, model, packing=True, max_length=8)
    with pytest.raises(ValueError, match=r"pass a datasets\.Dataset"):
        _trainer(example, tmp_path, IterableDataset.from_generator(lambda: iter(EQUAL)), model)
