"""annotate_tokens: exact in the first epoch's batches, whatever the batches are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference_cases import (
    BATCHES,
    SIZES,
    VOCABULARY,
    Counting,
    alone,
    dataset,
    decoder,
    files,
    policy,
)

from iwsft import ImportanceWeightedMLE
from iwsft.language.batches import EpochBatches, TrajectoryDataset, collate
from iwsft.language.plan import UpdatePlan
from iwsft.language.reference import annotate_tokens
from iwsft.policies import CausalLMPolicy


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_is_the_log_prob_of_each_trajectory(layout: Any) -> None:
    data = dataset()
    keys = set(data.keys(True, True))
    annotate_tokens(policy(), data, BATCHES, layout=layout)
    assert set(data.keys(True, True)) == {*keys, "ref_log_prob"}
    found = data["ref_log_prob"]
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), alone(decoder(), data), rtol=1e-5, atol=1e-5)
    assert bool((found[~data["masks", "all_assistant_mask"]] == 0).all())


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_row", [True, False])
def test_first_weights_are_exactly_one(layout: Any, dtype: torch.dtype, one_row: bool) -> None:
    """In all batches of the first epoch, in training mode and with gradient."""
    model = decoder(dtype=dtype)
    theta = CausalLMPolicy(model, one_row=one_row)
    data = dataset(multiplicity=[1] * len(SIZES))
    entries = TrajectoryDataset(data)
    batches = EpochBatches(entries.sizes, batch_size=3, seed=1)
    annotate_tokens(theta, data, batches.of(0), layout=layout)
    loss = ImportanceWeightedMLE(theta, proposal="current", functional=False)
    loss.loss_mask_key = ("masks", "all_assistant_mask")
    loss.set_keys(action=("tokens", "full"))
    assert model.training
    for numbers in batches.of(0):
        batch = collate([entries[number] for number in numbers], layout=layout)
        terms = loss.terms(batch)
        assert terms.log_prob.requires_grad
        assert torch.equal(terms.log_weight, torch.zeros_like(terms.log_weight))
        assert torch.equal(terms.log_prob, batch["ref_log_prob"])


def test_drawn_several_times_the_first_batch_counts() -> None:
    """Batches are those of training, and batches with nothing new are not run."""
    data = dataset((9, 40, 5), multiplicity=[2, 1, 3])
    # Entries: 0 0 1 2 2 2.
    batches = [[0, 3], [2, 1], [4, 5], [4, 1]]
    asked = Counting(decoder())
    found = annotate_tokens(asked, data, batches)
    assert asked._asked == [[0, 2], [0, 1]]
    assert (found.batches, found.computed) == (2, 2)
    first = data.exclude("multiplicity")
    expected = asked.log_prob(collate([first[:9], first[49:]]))
    assert torch.equal(data["ref_log_prob"][:9], expected[0, :9])
    assert torch.equal(data["ref_log_prob"][49:], expected[1, :5])


def test_trajectories_in_no_batch_come_at_the_end() -> None:
    """Also those that are never drawn; their batches are no larger than the given ones."""
    data = dataset(multiplicity=[1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    asked = Counting(decoder())
    found = annotate_tokens(asked, data, [[0, 4], [1, 0]])
    assert found.batches == len(asked._asked)
    assert asked._asked[:2] == [[0, 5], [0, 1]]
    later = asked._asked[2:]
    assert sorted(sum(later, [])) == [2, 3, 4, 6, 7, 8, 9]
    assert all(sum(SIZES[t] for t in batch) <= SIZES[0] + SIZES[5] for batch in later)
    torch.testing.assert_close(
        data["ref_log_prob"].double(), alone(decoder(), data), rtol=1e-5, atol=1e-5
    )
    alone_too = dataset()
    annotate_tokens(policy(), alone_too)
    torch.testing.assert_close(alone_too["ref_log_prob"], data["ref_log_prob"])


def test_batches_of_a_plan_without_entries_for_some_processes() -> None:
    data = dataset()
    batches = EpochBatches(TrajectoryDataset(data).sizes, batch_size=1)
    plan = UpdatePlan(batches, accumulation=1, processes=3, epochs=1).epoch(0)
    assert [] in plan
    asked = Counting(decoder())
    annotate_tokens(asked, data, plan)
    assert len(asked._asked) == len(SIZES)
    twice = dataset()
    annotate_tokens(policy(), twice, [BATCHES[0], [], *BATCHES[1:]])
    annotate_tokens(policy(), data, BATCHES)
    assert torch.equal(twice["ref_log_prob"], data["ref_log_prob"])


def test_mode_and_gradients_are_as_they_were() -> None:
    theta = policy(attention_dropout=0.5)
    theta.model.lm_head.eval()
    data = dataset()
    annotate_tokens(theta, data, BATCHES)
    assert theta.training and theta.model.training and not theta.model.lm_head.training
    assert all(p.requires_grad and p.grad is None for p in theta.parameters())
    torch.testing.assert_close(
        data["ref_log_prob"].double(), alone(decoder(), data), rtol=1e-5, atol=1e-5
    )


def test_context_is_that_of_every_forward() -> None:
    plain, cast, half = dataset(), dataset(), dataset()
    annotate_tokens(policy(), plain, BATCHES)
    annotate_tokens(policy(), cast, BATCHES, context=lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        annotate_tokens(policy(), half, BATCHES)
    assert torch.equal(cast["ref_log_prob"], half["ref_log_prob"])
    assert not torch.allclose(cast["ref_log_prob"], plain["ref_log_prob"], atol=1e-4)


def test_not_finite_names_the_trajectory(tmp_path: Path) -> None:
    theta, data = policy(), dataset()
    theta.model.model.embed_tokens.weight.data[VOCABULARY - 1] = torch.nan
    # Trajectory 6 has 5 tokens from 67 on, the last 3 the assistant's.
    data["tokens", "full"][67] = VOCABULARY - 1
    data["collector", "traj_ids"] += 100
    with pytest.raises(ValueError, match="log-prob nan at token 2 of trajectory 106: look at"):
        annotate_tokens(theta, data, BATCHES, cache=tmp_path, save_every=0)
    assert "ref_log_prob" not in data.keys()  # noqa: SIM118
    # What was done before is kept.
    assert len(files(tmp_path)) == 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch 1 holds 10; entries run from 0 to 9"):
        annotate_tokens(policy(), dataset(), [[0], [3, 10]])
    with pytest.raises(ValueError, match="layout='flat' is unknown"):
        annotate_tokens(policy(), dataset(), BATCHES, layout="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be packed.* batch size \[4, 8\]"):
        annotate_tokens(policy(), dataset((8, 8, 8, 8)).reshape(4, 8), [[0]])
    with pytest.raises(ValueError, match=r"trajectories.copy\(\)"):
        annotate_tokens(policy(), dataset().lock_(), BATCHES)
    with pytest.raises(KeyError, match="all_assistant_mask.*missing"):
        annotate_tokens(policy(), dataset().exclude(("masks", "all_assistant_mask")), BATCHES)


def lora(seed: int, *, moved: bool = False, **settings: Any) -> CausalLMPolicy:
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj", "up_proj"], **settings}
    base = decoder()
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and "lora_B" in name:
                parameter.normal_(std=0.3)
    return CausalLMPolicy(model)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapters_are_off_and_no_part_of_the_key(tmp_path: Path, saved: Any) -> None:
    base, first, second = dataset(), dataset(), dataset()
    annotate_tokens(policy(), base, BATCHES)
    theta = lora(0, modules_to_save=saved)
    flags = [p.requires_grad for p in theta.parameters()]
    key = annotate_tokens(theta, first, BATCHES, cache=tmp_path).key
    assert torch.equal(first["ref_log_prob"], base["ref_log_prob"])
    assert flags == [p.requires_grad for p in theta.parameters()]
    again = annotate_tokens(lora(1, modules_to_save=saved), second, BATCHES, cache=tmp_path)
    assert again.key == key and again.computed == 1
    # At the start theta is the reference, bit for bit.
    batch = collate([TrajectoryDataset(first)[number] for number in BATCHES[0]])
    assert torch.equal(theta.log_prob(batch), batch["ref_log_prob"])
    with torch.no_grad():
        theta.model.get_base_model().model.embed_tokens.weight[-1] += 1e-6
    assert annotate_tokens(theta, dataset(), BATCHES, cache=tmp_path).key != key


def test_adapters_that_do_something_already_are_warned_of() -> None:
    data, base = dataset(), dataset()
    with pytest.warns(UserWarning, match="adapters change the log-probs already.*merge_and_unload"):
        annotate_tokens(lora(0, moved=True), data, BATCHES)
    annotate_tokens(policy(), base, BATCHES)
    assert torch.equal(data["ref_log_prob"], base["ref_log_prob"])
