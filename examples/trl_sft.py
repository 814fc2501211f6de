"""Run iw-SFT inside TRL: SFTTrainer formats, tokenises, batches and logs; the loss is ours.

A small decoder first learns sums by plain SFT, from answers of which some are wrong. Then the same
trainer fine-tunes it on the right ones with q = theta. Run it with ``python examples/trl_sft.py``.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from datasets import Dataset  # type: ignore[import-untyped]
from tensordict import NestedKey, TensorDict
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from iwsft import CausalLMPolicy, ImportanceWeightedMLE, ImportanceWeights, annotate_reference
from iwsft.trajectory import ASSISTANT_MASK, ATTENTION_MASK, REF_LOG_PROB, TOKENS, from_steps


class ImportanceWeightedSFTTrainer(SFTTrainer):
    """TRL's SFTTrainer with :class:`~iwsft.ImportanceWeightedMLE` as the training loss.

    TRL does everything before the loss: formats, chat templates, masks, truncation, order. The
    reference is the model that is passed in, without its PEFT adapters. Its log-probs are a column
    of the prepared dataset. Evaluation is TRL's plain negative log-likelihood.

    The trainer runs on one process or with DDP. It computes the reference before an engine exists.
    So for ZeRO-3 and FSDP2, and for a q that lags behind theta, use
    ``iwsft.language.trainer.ImportanceWeightedTrainer``.

    Args:
        *args: Arguments of SFTTrainer.
        proposal: Choice of q: ``"current"`` is q = theta, which gives iw-SFT; ``"reference"``
            gives SFT.
        importance_weights: Chain of transforms from log-ratios to weights.
        **kwargs: Arguments of SFTTrainer.

    Raises:
        ValueError: A row of a batch would not be one trajectory, or the dataset is not a
            ``datasets.Dataset``.
    """

    # The loss is divided by the trajectories of the whole update.
    loss_is_scaled_for_ga = True
    train_dataset: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        proposal: Literal["current", "reference"] = "current",
        importance_weights: ImportanceWeights | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.packing or self.args.padding_free:
            raise ValueError("a row must be one trajectory: set packing and padding_free to False")
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError("the reference needs all rows at the start: pass a datasets.Dataset")
        self.policy = CausalLMPolicy(self.model)
        self.loss = ImportanceWeightedMLE(
            self.policy,
            importance_weights=importance_weights,
            proposal=proposal,
            reduction="sum",
            functional=False,
        )
        self.loss.loss_mask_key = ASSISTANT_MASK
        self.loss.set_keys(action=TOKENS)
        self.train_dataset = self.annotated(self.train_dataset)
        self.data_collator = WithReference(self.data_collator)

    def annotated(self, dataset: Dataset) -> Dataset:
        """Return the prepared dataset with log pi_ref of each token as a column."""
        ids, labels = dataset["input_ids"], dataset["labels"]
        sizes = torch.tensor([len(row) for row in ids])
        rows = torch.arange(len(sizes)).repeat_interleave(sizes)
        each = steps(*(torch.tensor([*chain.from_iterable(column)]) for column in (ids, labels)))
        # Nothing predicts the first token of a row.
        each[ASSISTANT_MASK][sizes.cumsum(0) - sizes] = False
        trajectories = from_steps(each, rows)
        with self.accelerator.autocast():
            annotate_reference(
                self.policy, trajectories, cache=Path(self.args.output_dir) / "reference"
            )
        found = trajectories[REF_LOG_PROB].split(sizes.tolist())
        return dataset.add_column(REF_LOG_PROB, [row.tolist() for row in found])

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column of the reference in the dataset."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*self._signature_columns, REF_LOG_PROB}]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the number of trajectories of an update, over micro-batches and processes."""
        mine = sum(len(batch["labels"]) for batch in batch_samples)
        return self.accelerator.reduce(torch.tensor(float(mine), device=device), "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return our loss in training and TRL's in evaluation."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        each = steps(inputs["input_ids"], inputs["labels"])
        each[ASSISTANT_MASK][:, 0] = False
        each[ATTENTION_MASK] = inputs["attention_mask"].bool()
        each[REF_LOG_PROB] = inputs[REF_LOG_PROB]
        self.policy.model = model
        out = self.loss(TensorDict(each, batch_size=inputs["labels"].shape))
        for name in ("ESS", "weight_mean", "weight_max", "kl_approx", "log_prob"):
            self._metrics["train"][name].append(out[name].item())
        # Engines average gradients over processes.
        return out["loss_iw_mle"] * (self.accelerator.num_processes / num_items_in_batch)


def steps(ids: Tensor, labels: Tensor) -> dict[NestedKey, Tensor]:
    """Return TRL's columns under the library's keys."""
    real = torch.ones_like(ids, dtype=torch.bool)
    return {TOKENS: ids, ATTENTION_MASK: real, ASSISTANT_MASK: labels != -100}


@dataclass
class WithReference:
    """TRL's collator, which here also pads the reference's log-probs."""

    collator: Any

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.collator(rows)
        if REF_LOG_PROB in rows[0]:
            batch[REF_LOG_PROB] = torch.zeros(batch["labels"].shape)
            for place, row in enumerate(rows):
                found = torch.tensor(row[REF_LOG_PROB])
                batch[REF_LOG_PROB][place, : len(found)] = found
        return batch


@dataclass(frozen=True)
class Settings:
    """The settings of the example; the defaults take about half a minute on one core."""

    rows: int = 4000
    """Number of sums with an answer."""
    wrong: float = 0.4
    """Share of wrong answers."""
    sft_updates: int = 300
    """Number of updates of SFT on all rows."""
    updates: int = 100
    """Number of updates of iw-SFT on the right rows."""
    batch_size: int = 64
    """Number of rows of an update."""
    lr: float = 3e-3
    """Learning rate of SFT; that of iw-SFT is a third of it."""
    proposal: Literal["current", "reference"] = "current"
    """Choice of q in the second part; with "reference" it is SFT again."""
    seed: int = 0
    """Seed of the sums, the initial weights and the order of rows."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character of a sum."""
    words = ["<pad>", "<eos>", *"0123456789+="]
    built = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<pad>"))
    built.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def decoder(vocabulary: int) -> Qwen2ForCausalLM:
    """Return a small decoder with random weights."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def answered(settings: Settings) -> list[dict[str, Any]]:
    """Return sums with answers, some of which are off by one."""
    draw = random.Random(settings.seed)
    found = []
    for _ in range(settings.rows):
        a, b = draw.randrange(10), draw.randrange(10)
        correct = draw.random() >= settings.wrong
        answer = a + b if correct else a + b + 1
        found.append({"prompt": f"{a}+{b}=", "completion": str(answer), "correct": correct})
    return found


def train(
    model: Qwen2ForCausalLM,
    rows: list[dict[str, Any]],
    folder: str | Path,
    settings: Settings,
    **own: Any,
) -> list[dict[str, float]]:
    """Train on rows and return TRL's log lines; ``own`` changes the trainer and its SFTConfig."""
    for_trainer = {
        name: own.pop(name) for name in ("proposal", "importance_weights") if name in own
    }
    trainer = ImportanceWeightedSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            **{
                "per_device_train_batch_size": settings.batch_size,
                "seed": settings.seed,
                "logging_steps": 10,
                "save_strategy": "no",
                "report_to": "none",
                "bf16": False,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                **own,
            },
        ),
        train_dataset=Dataset.from_list(rows).remove_columns("correct"),
        processing_class=tokenizer(),
        **for_trainer,
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM) -> float:
    """Return the share of all sums that the model gets right, without sampling."""
    words = tokenizer()
    sums = [(a, b) for a in range(10) for b in range(10)]
    asked = words([f"{a}+{b}=" for a, b in sums], return_tensors="pt")
    found = model.eval().generate(
        input_ids=asked["input_ids"],
        attention_mask=asked["attention_mask"],
        max_new_tokens=3,
        do_sample=False,
    )
    said = words.batch_decode(found[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [text.replace(" ", "") == str(a + b) for text, (a, b) in zip(said, sums, strict=True)]
    return sum(right) / len(right)


def main(settings: Settings) -> list[dict[str, float]]:
    """Run SFT on all rows, then iw-SFT on the right ones, and return the log lines of iw-SFT."""
    torch.manual_seed(settings.seed)
    model = decoder(len(tokenizer()))
    rows = answered(settings)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            rows,
            Path(folder) / "sft",
            settings,
            proposal="reference",
            max_steps=settings.sft_updates,
            learning_rate=settings.lr,
        )
        before = accuracy(model)
        history = train(
            model,
            [row for row in rows if row["correct"]],
            Path(folder) / "iw-sft",
            settings,
            proposal=settings.proposal,
            max_steps=settings.updates,
            learning_rate=settings.lr / 3,
        )
    first, last = history[0], history[-1]
    print(
        f"iw-SFT in TRL's SFTTrainer: {settings.updates} updates, loss {first['loss']:.3f} -> "
        f"{last['loss']:.3f}, ESS {last['ESS']:.3f}, KL {last['kl_approx']:.3f}; "
        f"right sums {before:.0%} -> {accuracy(model):.0%}"
    )
    return history


if __name__ == "__main__":
    main(tyro.cli(Settings))
