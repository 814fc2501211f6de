"""TRL's trainer with our loss: the updates of our own, packed or not, and what is refused."""

from __future__ import annotations

import json
import runpy
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from torch.nn.functional import log_softmax

pytest.importorskip("trl")

from transformers import AutoTokenizer, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from iwsft import ImportanceWeights
from iwsft.checkpoint import CheckpointError
from iwsft.language import ImportanceWeightedConfig, ImportanceWeightedTrainer, read, tokenize
from iwsft.language.trl import ImportanceWeightedSFTTrainer
from iwsft.weights import ClipLogRatio, ClipWeight, SelfNormalize, Temperature
from tests.datasets.text.chat_tokenizers import byte_level
from tests.language.trl_cases import ROWS, SETTINGS, decoder, in_trl, trained
from tests.policies.language_models import longrope

ROOT = Path(__file__).parents[2]
PACKED = {"packing": True, "max_length": 32}
FREE = {"padding_free": True, "max_length": None}


@pytest.fixture
def model() -> Any:
    return decoder()


def by_us(folder: Path, model: Any, rows: list[Any] = ROWS, **own: Any) -> list[dict[str, Any]]:
    weights = own.pop("importance_weights", None)
    settings = {key: value for key, value in own.items() if key not in {**PACKED, **FREE}}
    return trained(
        ImportanceWeightedTrainer(
            model,
            ImportanceWeightedConfig(str(folder), **{**SETTINGS, **settings}),
            train_dataset=list(rows),
            importance_weights=weights,
            processing_class=byte_level(),
        )
    )


TURN = {"role": "assistant", "content": "4"}
WEIGHTED = [{**row, "weight": number / 4} for number, row in enumerate(ROWS)]
SIGNED = [{**row, "weight": (-0.5) ** number} for number, row in enumerate(ROWS)]
BELOW = [{**row, "weight": -1.0 if number else 1.0} for number, row in enumerate(ROWS)]
ASYMRE = ImportanceWeights.asymre()
BOUNDED = ImportanceWeights(trajectory=[ClipWeight(max=1.0)])
STEPS = ImportanceWeights(reduce=None)
SUM = ImportanceWeights([Temperature(0.3)], "sum", [ClipWeight(max=30.0), SelfNormalize()])
DFT = ImportanceWeights.dft()
LARGE = ImportanceWeights([ClipLogRatio(50.0, 60.0)], "sum")  # at least exp(50) for each token


@pytest.mark.parametrize(
    "own",
    [
        {"proposal": "reference"},
        {"proposal": "reference", "importance_weights": ImportanceWeights(kl=0.5)},
        {"proposal": "current"},
        {"proposal": "current", **PACKED},
        {"proposal": "current", "importance_weights": SUM, **FREE},
        # At the default rate weights reach 3e4, and amplify what two products round differently.
        {"proposal": "current", "importance_weights": STEPS, "learning_rate": 0.01, **PACKED},
        {"proposal": "current", "importance_weights": DFT},
        {"proposal": "current", "length_normalize": False, "learning_rate": 0.01, **PACKED},
        {"proposal": "cached", "sync_every": 2, **PACKED},
        {"proposal": "lagged", "ema_decay": 0.5, "importance_weights": SUM},
        {"proposal": "reference", "rows": WEIGHTED, **PACKED},
        {"proposal": "current", "importance_weights": BOUNDED, "rows": SIGNED},
        {"proposal": "current", "importance_weights": BOUNDED, "rows": SIGNED, **PACKED},
    ],
    ids=lambda own: " ".join(map(str, own.values()))[:40],
)
def test_updates_are_those_of_our_own_trainer(
    model: Any, tmp_path: Path, own: dict[str, Any]
) -> None:
    ours = by_us(tmp_path / "ours", deepcopy(model), **own)
    theirs = trained(in_trl(tmp_path / "trl", model, **own))
    assert [row["loss"] for row in theirs] == pytest.approx([r["loss"] for r in ours], rel=1e-5)
    for name in ("ESS", "weight_max", "weight_mean", "log_prob", "grad_norm"):
        found, expected = ([row[name] for row in rows] for rows in (theirs, ours))
        assert found == pytest.approx(expected, rel=1e-4), name
    if own["proposal"] != "reference" and own.get("importance_weights") is not DFT:
        assert theirs[0]["weight_max"] == pytest.approx(1.0, abs=1e-5)
        assert theirs[-1]["weight_max"] - theirs[-1]["weight_mean"] > 1e-3
        assert "entropy" in theirs[0]


@pytest.mark.parametrize("trainer", [by_us, in_trl])
def test_dft_is_that_of_trl(model: Any, tmp_path: Path, trainer: Any) -> None:
    """TRL divides by the tokens of an update, and we by its rows."""
    config = SFTConfig(
        str(tmp_path / "trl"), loss_type="dft", gradient_checkpointing=False, **SETTINGS
    )
    theirs = SFTTrainer(
        deepcopy(model),
        config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_level(),
    )
    tokens = sum(label != -100 for row in theirs.train_dataset["labels"] for label in row)
    truth = trained(theirs)
    own = {
        "learning_rate": SETTINGS["learning_rate"] * len(ROWS) / tokens,
        "length_normalize": False,
        "proposal": "current",
        "importance_weights": DFT,
    }
    made = trainer(tmp_path / "ours", model, **own)
    rows = made if isinstance(made, list) else trained(made)
    for name in ("loss", "grad_norm"):
        ours = [row[name] * len(ROWS) / tokens for row in rows]
        assert ours == pytest.approx([row[name] for row in truth], rel=1e-5), name
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(parameter, theirs.model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_formula_computed_a_row_at_a_time(model: Any, tmp_path: Path) -> None:
    tokenizer, copy = byte_level(), deepcopy(model)

    def mean_log_prob(row: dict[str, str]) -> torch.Tensor:
        asked = tokenizer(row["prompt"])["input_ids"]
        ids = asked + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        log_prob = log_softmax(copy(torch.tensor([ids])).logits[0, :-1], -1)
        return log_prob.gather(1, torch.tensor(ids[1:])[:, None])[len(asked) - 1 :].mean()

    with torch.no_grad():
        reference = torch.stack([mean_log_prob(row) for row in ROWS])
    optimizer, losses = torch.optim.SGD(copy.parameters(), lr=0.05), []
    for _ in range(4):
        log_prob = torch.stack([mean_log_prob(row) for row in ROWS])
        loss = -((log_prob.detach() - reference).exp() * log_prob).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # In four micro-batches, padded and packed.
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for name, more in (("padded", {}), ("free", FREE)):
        found = trained(in_trl(tmp_path / name, deepcopy(model), **parts, **more))
        assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-5)


def test_turns_of_the_assistant_alone_and_rows_cut_before_their_answer(
    model: Any, tmp_path: Path
) -> None:
    ask = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    chats = [{"messages": ask}, {"messages": [*ask, *ask]}]
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
        "<|im_end|>{% endif %}\n{% endfor %}"
    )
    template = tmp_path / "marked.jinja"
    template.write_text(marked)
    own: dict[str, Any] = {"assistant_only_loss": True, "chat_template_path": str(template)}
    found = trained(
        in_trl(tmp_path / "a", deepcopy(model), chats, **own, packing=True, max_length=200)
    )
    assert len(found) == 4 and found[0]["weight_max"] == pytest.approx(1.0, abs=1e-5)
    long = [*ROWS, {"prompt": "9" * 40, "completion": "1"}]
    expected = trained(in_trl(tmp_path / "b", deepcopy(model), **PACKED))
    found = trained(in_trl(tmp_path / "c", deepcopy(model), long, **PACKED))
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


def test_adapters_are_off_in_the_reference_and_dropout_in_the_weights(
    model: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig

    names = ["q_proj", "v_proj"]
    lora = LoraConfig(r=4, target_modules=names, lora_dropout=0.5, task_type="CAUSAL_LM")
    found = trained(in_trl(tmp_path, model, peft_config=lora))
    assert found[0]["weight_max"] == pytest.approx(1.0, abs=1e-5)
    assert found[-1]["weight_max"] > 1 + 1e-6


@pytest.mark.parametrize("own", [{"sync_every": 3}, {"ema_decay": 0.5}], ids=["cached", "lagged"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    model: Any, tmp_path: Path, own: dict[str, Any]
) -> None:
    own["proposal"] = "cached" if "sync_every" in own else "lagged"
    own |= {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    whole = trained(in_trl(tmp_path, deepcopy(model), **own))
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    again = trained(in_trl(tmp_path, deepcopy(model), **own), **resume)
    assert [row["loss"] for row in again[-2:]] == [row["loss"] for row in whole[-2:]]
    found = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in last.items())
    with pytest.raises(CheckpointError, match="other settings"):
        in_trl(tmp_path, model, **own, length_normalize=False).train(**resume)


def test_evaluation_is_trls(model: Any, tmp_path: Path) -> None:
    held_out = Dataset.from_list(ROWS)
    ours = in_trl(tmp_path / "ours", deepcopy(model), eval_dataset=held_out)
    args = SFTConfig(str(tmp_path / "trl"), gradient_checkpointing=False, **SETTINGS)
    theirs = SFTTrainer(
        model, args, train_dataset=held_out, eval_dataset=held_out, processing_class=byte_level()
    )
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("own", [{}, {"packing": True}], ids=["padded", "packed"])
def test_rows_that_trl_cuts_or_leaves_out_are_told(
    model: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder, own: dict[str, Any]
) -> None:
    """A token is a byte, and a row ends with an EOS: 9, 21, 61 and 81 tokens."""
    rows = [{"prompt": "p" * n, "completion": "c" * n} for n in (4, 10, 30, 40)]
    in_trl(tmp_path, model, rows=rows, max_length=100, **own)
    assert not [each for each in recwarn if "TRL" in str(each.message)]
    told = r"leaves out 2 of 4 rows, .* max_length=20, which 1 reach; raise max_length in SFTConfig"
    with pytest.warns(UserWarning, match=told):
        in_trl(tmp_path, model, rows=rows, max_length=20, **own)
    with pytest.raises(ValueError, match="there is no token to train on within max_length=3 of"):
        in_trl(tmp_path, model, rows=rows, max_length=3, **own)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"loss_type": "dft"}, "loss_type='dft' is another loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is another loss"),
        ({"compute_loss_func": print}, "compute_loss_func=.* is another loss"),
        *(({**PACKED, "packing_strategy": name}, "use 'bfd'") for name in ("wrapped", "bfd_split")),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"proposal": "cached"}, "proposal='cached' needs sync_every"),
        ({"proposal": "theta"}, "proposal='theta' must be one of"),
        (
            {"importance_weights": SUM, "gradient_accumulation_steps": 2},
            "compares the weights of an update, divided here into 2",
        ),
        ({"importance_weights": "auto"}, "importance_weights='auto' must be a chain"),
        ({"importance_weights": ImportanceWeights.auto()}, "standard_score, which TRL's batches"),
        ({"importance_weights": LARGE}, r"of 5 steps a weight of at least exp\(250\)"),
        ({"rows": IterableDataset.from_generator(lambda: iter(ROWS))}, r"a datasets\.Dataset"),
        ({"model": longrope(6, vocab_size=400)}, "6 to 9 tokens, .* up to 6 otherwise beside lon"),
        ({"rows": []}, "there is no row in train_dataset"),
        ({"eval_dataset": {"a": Dataset.from_list([])}}, "there is no row in eval_dataset"),
        ({"rows": [{**ROWS[0], "weight": 1e-46}]}, "row 0: the weight 1e-46 is beyond float32"),
        ({"rows": [{**ROWS[0], "weight": "1"}]}, "row 0: weight must be a finite number, it"),
        ({"rows": [*WEIGHTED, ROWS[0]]}, "row 8: weight must be a finite number, it is None"),
        ({"rows": [{**ROWS[0], "weight": 0.0}]}, "the column 'weight' is 0 everywhere"),
        ({"rows": SIGNED, "proposal": "reference"}, "'data_weight' is negative"),
        ({"rows": BELOW, "importance_weights": ASYMRE}, "'data_weight' has a mean of at most 0"),
        ({"rows": [{**ROWS[0], "correct": n == 0} for n in (0, 1)]}, "row 1: TRL does not read 'c"),
        ({"rows": [{**ROWS[0], "is_correct": n == 0} for n in (0, 1)]}, "row 1: TRL does not re"),
        ({"rows": [{**ROWS[0], "failed": "yes"}]}, r"row 0: TRL does not read 'failed' \('yes'"),
        ({"rows": [{**ROWS[0], "train": n == 0} for n in (0, 1)]}, "row 1: TRL does not read 'tr"),
        ({"rows": [{**ROWS[0], "sample_weight": 0.5}]}, "row 0: TRL does not read 'sample_weight'"),
        ({"rows": [{**ROWS[0], "count": 3}]}, r"row 0: TRL does not read 'count' \(3\)"),
        ({"rows": [{**ROWS[0], "ref_log_probs": [-1.0]}]}, "row 0: TRL does not read 'ref_log"),
        ({"rows": [{"messages": [TURN, {**TURN, "weight": 0.5}]}]}, "row 0: TRL does not read the"),
    ],
)
def test_what_it_can_not_do_is_refused(
    model: Any, tmp_path: Path, own: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OverflowError, TypeError), match=message) as refused:
        in_trl(tmp_path, own.pop("model", model), **own)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("columns", "own", "trained"),
    [
        # TRL makes its own attention mask, and trains on padding and on the prompt.
        ({"attention_mask": [1, 1, 1, 0]}, {}, None),
        ({"attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 7, 8]}, {}, None),
        ({"completion_mask": [0, 0, 1, 1]}, {}, None),
        ({"attention_mask": [1, 1, 1, 0], "labels": [5, 6, 7, -100]}, {}, [6, 7]),
        ({"attention_mask": [1, 1, 1, 1]}, {}, [6, 7, 8]),
        ({"completion_mask": [0, 0, 1, 1]}, {"completion_only_loss": True}, [7, 8]),
        ({"completion_mask": [0, 1, 1, 1]}, {}, [6, 7, 8]),
        ({"assistant_masks": [0, 0, 1, 0]}, {}, [7]),
    ],
)
def test_masks_of_tokenised_rows_are_kept_or_refused(
    model: Any, tmp_path: Path, columns: dict[str, Any], own: dict[str, Any], trained: Any
) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], **columns}]
    if trained is None:
        with pytest.raises(ValueError, match="row 0: TRL trains on tokens that '.*_mask' leaves"):
            in_trl(tmp_path, model, rows=rows, **own)
        return
    steps = in_trl(tmp_path, model, rows=rows, **own)._trajectories
    assert steps["tokens", "full"][steps["masks", "all_assistant_mask"]].tolist() == trained


def test_what_only_some_runs_need_is_not_asked_of_others(model: Any, tmp_path: Path) -> None:
    in_trl(tmp_path, model, proposal="reference", importance_weights=LARGE)
    # Without settings of TRL, too, it is the rows that are missing.
    with pytest.raises(ValueError, match=r"a datasets\.Dataset"):
        ImportanceWeightedSFTTrainer(model)
    with pytest.warns(UserWarning, match="torch.bfloat16, which round small steps"):
        in_trl(tmp_path, model.bfloat16())


@pytest.mark.parametrize(
    ("own", "passes"),
    [
        ({"proposal": "reference"}, [True]),
        ({"proposal": "current"}, [True]),
        ({"proposal": "current", "dropout": 0.5}, [True, False]),
        ({"proposal": "lagged", "ema_decay": 0.5}, [True, False]),
    ],
)
def test_no_pass_takes_more_memory_than_the_training(
    model: Any, tmp_path: Path, own: dict[str, Any], passes: list[bool]
) -> None:
    """The reference and q have batches of the same size and no graph; a q is held once."""
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = own.get("dropout", 0.0)
    own = {key: value for key, value in own.items() if key != "dropout"}
    trainer = in_trl(tmp_path, model, per_device_train_batch_size=2, max_steps=2, **own)
    calls: list[tuple[bool, int]] = []

    def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        calls.append((torch.is_grad_enabled(), len(inputs["input_ids"])))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trained(trainer)
    sweep = [] if own["proposal"] == "reference" else [False] * (len(ROWS) // 2)
    assert [with_graph for with_graph, _ in calls] == sweep + 2 * passes
    assert {rows for _, rows in calls} == {2}
    assert len(trainer._loss.state_dict()) == len(trainer.model.state_dict())


def test_our_own_trainer_takes_a_name_and_rows_of_text(model: Any, tmp_path: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    rows = [{**row, "correct": k != 3} for k, row in enumerate(ROWS)]
    trainer = ImportanceWeightedTrainer(
        str(tmp_path / "model"),
        ImportanceWeightedConfig(str(tmp_path / "run"), **SETTINGS, max_length=32),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=read(rows),
    )
    assert trainer.model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    encoded = tokenize(read(rows[:3] + rows[4:]), tokenizer, max_length=32).trajectories
    assert trainer.train_dataset.trajectories["tokens", "full"].equal(encoded["tokens", "full"])
    before = trainer.evaluate()["eval_loss"]
    assert len(trained(trainer)) == 4 and trainer.evaluate()["eval_loss"] < before


def test_the_example_trains_and_saves(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    example = runpy.run_path(str(ROOT / "examples" / "trl_sft.py"))
    main, place = example["main"], tmp_path / "model"
    history = main(str(place), tmp_path / "rows.jsonl", tmp_path / "out", updates=10)
    assert history[0]["ESS"] > 0.5 and history[0]["log_prob"] < 0
    Qwen2ForCausalLM.from_pretrained(tmp_path / "out")


def test_workers_do_not_run_the_script_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a script without a main guard: a process that imports it would end with an error."""
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('run again')")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    alone, own = (
        [
            row["loss"]
            for row in trained(in_trl(tmp_path, deepcopy(model), dataloader_num_workers=n))
        ]
        for n in (0, 1)
    )
    assert own == alone
