"""annotate_reference of tokens: exact in the first epoch's batches, whatever the batches are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_cases import (
    BATCHES,
    SIZES,
    VOCABULARY,
    Counting,
    annotate,
    dataset,
    decoder,
    files,
    policy,
)

from iwsft import annotate_reference
from iwsft.forward_pass import ForwardPass
from iwsft.language.batches import EpochBatches, TrajectoryDataset, collate
from iwsft.language.loss import token_loss
from iwsft.language.plan import UpdatePlan
from iwsft.policies import CausalLMPolicy
from iwsft.trajectory import pack, pad
from tests.policies.language_models import alone


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_is_the_log_prob_of_each_trajectory(layout: Any) -> None:
    data = dataset()
    keys = set(data.keys(True, True))
    annotate(policy(), data, layout=layout)
    assert set(data.keys(True, True)) == {*keys, "ref_log_prob"}
    log_prob = data["ref_log_prob"]
    assert log_prob.dtype == torch.float32 and not log_prob.requires_grad
    torch.testing.assert_close(
        log_prob.double(), alone(decoder().double().eval(), data), rtol=1e-5, atol=1e-5
    )
    assert bool((log_prob[~data["masks", "all_assistant_mask"]] == 0).all())


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_first_weights_are_exactly_one(
    layout: Any, dtype: torch.dtype, one_row: bool, device: str
) -> None:
    """In all batches of the first epoch, in training mode and with gradient."""
    model = decoder(dtype=dtype).to(device)
    theta = CausalLMPolicy(model, one_row=one_row)
    data = dataset(multiplicity=[1] * len(SIZES))
    entries = TrajectoryDataset(data)
    batches = EpochBatches(entries.sizes, batch_size=3, seed=1)
    annotate(theta, data, batches.of(0), layout=layout)
    loss = token_loss(theta, proposal="current")
    assert model.training
    for numbers in batches.of(0):
        batch = collate([entries[number] for number in numbers], layout=layout).to(device)
        terms = loss.terms(batch)
        assert terms.log_prob.requires_grad
        assert torch.equal(terms.log_weight, torch.zeros_like(terms.log_weight))
        assert torch.equal(terms.log_prob, batch["ref_log_prob"])


def test_the_first_of_several_batches_counts() -> None:
    """Batches are those of training, and batches with nothing new are not run."""
    data = dataset((9, 40, 5), multiplicity=[2, 1, 3])
    counting = Counting(decoder())
    annotate(counting, data, [[0, 2], [1, 0], [2, 2], [2, 0]])
    assert counting._batches == [[0, 2], [0, 1]]
    first = data.exclude("multiplicity")
    expected = counting.log_prob(collate([first[:9], first[49:]]))
    assert torch.equal(data["ref_log_prob"][:9], expected[0, :9])
    assert torch.equal(data["ref_log_prob"][49:], expected[1, :5])


def test_trajectories_in_no_batch_come_at_the_end() -> None:
    """They have a reference too, in batches that are not larger than the given ones."""
    data = dataset(multiplicity=[1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    counting = Counting(decoder())
    annotate(counting, data, [[0, 5], [1, 0]])
    assert counting._batches[:2] == [[0, 5], [0, 1]]
    later = counting._batches[2:]
    assert sorted(sum(later, [])) == [2, 3, 4, 6, 7, 8, 9]
    assert all(sum(SIZES[t] for t in batch) <= SIZES[0] + SIZES[5] for batch in later)
    torch.testing.assert_close(
        data["ref_log_prob"].double(), alone(decoder().double().eval(), data), rtol=1e-5, atol=1e-5
    )
    for plain in (dataset(), pad(dataset())):
        annotate_reference(policy(), plain)
        plain = plain if plain.ndim == 1 else pack(plain)
        torch.testing.assert_close(plain["ref_log_prob"], data["ref_log_prob"])


def test_without_batches_they_are_of_similar_length() -> None:
    counting, data = Counting(decoder()), dataset()
    annotate_reference(counting, data, rows=40)
    longest = [max(SIZES[t] for t in batch) for batch in counting._batches]
    assert longest == sorted(longest, reverse=True)
    assert all(
        longest[n] * len(batch) <= 40 or len(batch) == 1
        for n, batch in enumerate(counting._batches)
    )
    torch.testing.assert_close(
        data["ref_log_prob"].double(), alone(decoder().double().eval(), data), rtol=1e-5, atol=1e-5
    )


def test_batches_of_a_plan_without_entries_for_some_processes() -> None:
    data = dataset()
    batches = EpochBatches(TrajectoryDataset(data).sizes, batch_size=1)
    plan = UpdatePlan(batches, 1, processes=3, process=0, epochs=1).epoch(0)
    assert [] in plan
    counting = Counting(decoder())
    annotate(counting, data, plan)
    assert len(counting._batches) == len(SIZES)
    twice = dataset()
    annotate(policy(), twice, [BATCHES[0], [], *BATCHES[1:]])
    annotate(policy(), data)
    assert torch.equal(twice["ref_log_prob"], data["ref_log_prob"])


def test_what_the_data_give_counts(tmp_path: Path) -> None:
    """Of two trajectories; of the others it is the policy's own, also from the cache."""
    data, given = dataset(), dataset()
    annotate(policy(), data)
    own = data["ref_log_prob"]
    mine = torch.where(data["collector", "traj_ids"] < 2, own - 1, torch.nan)
    given["given_ref_log_prob"] = mine
    for _ in range(2):
        annotate(policy(), given, cache=tmp_path)
        assert torch.equal(given["ref_log_prob"], torch.where(mine.isnan(), own, mine))


def test_not_finite_names_the_trajectory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iwsft.reference._PART", 1)
    theta, data = policy(), dataset()
    theta.model.model.embed_tokens.weight.data[VOCABULARY - 1] = torch.nan
    # Trajectory 6 has 5 tokens from 67 on, the last 3 the assistant's.
    data["tokens", "full"][67] = VOCABULARY - 1
    data["collector", "traj_ids"] += 100
    with pytest.raises(
        ValueError, match="log-prob nan at step 2 of trajectory 106, and 3 of 8 log-probs"
    ):
        annotate(theta, data, cache=tmp_path)
    assert "ref_log_prob" not in data.keys()  # noqa: SIM118
    # Earlier parts stay; the first batch is none.
    assert len(files(tmp_path)) == 2


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch 1 holds trajectories 3 to 10; .* from 0 to 9"):
        annotate(policy(), dataset(), [[0], [3, 10]])
    with pytest.raises(ValueError, match="layout='flat' must be one of"):
        annotate(policy(), dataset(), layout="flat")
    with pytest.raises(ValueError, match=r"must be packed.* batch size \[4, 8\]"):
        annotate(policy(), dataset((8, 8, 8, 8)).reshape(4, 8), [[0]])
    with pytest.raises(ValueError, match=r"trajectories.copy\(\)"):
        annotate(policy(), dataset().lock_())
    with pytest.raises(KeyError, match="all_assistant_mask.*is not in the batch"):
        annotate_reference(policy(), dataset().exclude(("masks", "all_assistant_mask")))


def lora(seed: int, *, moved: float = 0.0, **settings: Any) -> CausalLMPolicy:
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj", "up_proj"], **settings}
    base = decoder()
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and "lora_B" in name:
                parameter.normal_(std=moved)
    return CausalLMPolicy(model)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapters_are_off_and_no_part_of_the_key(tmp_path: Path, saved: Any) -> None:
    base, first, second = dataset(), dataset(), dataset()
    annotate(policy(), base)
    theta = lora(0, modules_to_save=saved)
    flags = [p.requires_grad for p in theta.parameters()]
    annotate(theta, first, cache=tmp_path)
    assert torch.equal(first["ref_log_prob"], base["ref_log_prob"])
    assert flags == [p.requires_grad for p in theta.parameters()]
    annotate(lora(1, modules_to_save=saved), second, cache=tmp_path)
    assert len(files(tmp_path)) == 1 and torch.equal(first["ref_log_prob"], second["ref_log_prob"])
    # At the start theta is the reference, bit for bit.
    batch = collate([TrajectoryDataset(first)[number] for number in BATCHES[0]])
    assert torch.equal(theta.log_prob(batch), batch["ref_log_prob"])
    with torch.no_grad():
        theta.model.get_base_model().model.embed_tokens.weight[-1] += 1e-6
    annotate(theta, dataset(), cache=tmp_path)
    assert len(files(tmp_path)) == 2


def test_adapters_that_do_something_already_are_warned_of() -> None:
    data, base, theta = dataset(), dataset(), lora(0, moved=0.3)
    message = "adapters change the log-probs already.*merge_and_unload"
    with pytest.warns(UserWarning, match=message) as warned:
        annotate_reference(theta, data)
    assert warned[0].filename == __file__
    annotate_reference(policy(), base)
    assert torch.equal(data["ref_log_prob"], base["ref_log_prob"])
    # What other kernels make of the same weights is not a change.
    theta = lora(0, moved=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        annotate_reference(theta, data)
    assert not torch.equal(ForwardPass(theta, data).log_prob(), base["ref_log_prob"])
