"""The trainer gives the updates of a plain loop, however they are divided or interrupted."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tiny import ENTRIES, losses, model, trainer, trajectories
from torch.nn.functional import log_softmax
from transformers import get_linear_schedule_with_warmup

from iwsft import EMA, HardSync, ImportanceWeightedMLE, ImportanceWeights, weights
from iwsft.forward_pass import ForwardPass
from iwsft.language import weighted
from iwsft.language.batches import EpochBatches, TrajectoryDataset, collate
from iwsft.lower_bound import LowerBound
from iwsft.policies import CausalLMPolicy
from iwsft.reference import write_reference
from iwsft.trajectory import STANDARD_SCORE

PROPOSALS: list[dict[str, Any]] = [
    {"proposal": "reference"},
    {"proposal": "current"},
    {"proposal": "cached", "sync_every": 3},
    {"proposal": "lagged", "ema_decay": 0.7},
    {"proposal": "current", "reference": "synced", "sync_every": 3},
]
NONE = {"proposal": "current", "reference": "none"}
CHAIN = ImportanceWeights(step=[weights.Temperature(0.5)], trajectory=[weights.ClipWeight(max=3.0)])


def _plain_loop(
    proposal: dict[str, Any], chain: ImportanceWeights, updates: int = 7
) -> list[float]:
    """The same training written out: one model, a copy for q, whole batches."""
    data, theta = trajectories(), model()
    loss = ImportanceWeightedMLE(
        CausalLMPolicy(theta),
        importance_weights=chain,
        proposal=proposal["proposal"].replace("cached", "lagged"),
        reference=proposal.get("reference"),
        functional=False,
    )
    loss.loss_mask_key = ("masks", "all_assistant_mask")
    loss.set_keys(action=("tokens", "full"))
    with torch.no_grad():
        data.set("ref_log_prob", CausalLMPolicy(deepcopy(theta)).log_prob(data))
    q = None
    if "sync_every" in proposal:
        synced = data if loss.awaits_sync else None
        q = HardSync(loss, every=proposal["sync_every"], trajectories=synced)
    if "ema_decay" in proposal:
        q = EMA(loss, decay=proposal["ema_decay"])
    batches = EpochBatches(torch.ones(ENTRIES, dtype=torch.int64), batch_size=4, seed=42)
    dataset = TrajectoryDataset(data)
    optimizer = torch.optim.AdamW(theta.parameters(), lr=3e-3, weight_decay=0.0)
    rate = get_linear_schedule_with_warmup(optimizer, 0, updates)
    values: list[float] = []
    while len(values) < updates:
        for numbers in batches:
            value = loss(collate([dataset[number] for number in numbers]))["loss_iw_mle"]
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
            optimizer.step()
            rate.step()
            if q is not None:
                q.step()
            values.append(value.item())
    return values[:updates]


@pytest.mark.parametrize(
    "proposal", [*PROPOSALS, NONE], ids=lambda p: p["proposal"] + p.get("reference", "")
)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_training_is_that_of_a_plain_loop(
    tmp_path: Path, proposal: dict[str, Any], layout: str
) -> None:
    run = trainer(tmp_path, importance_weights=CHAIN, layout=layout, **proposal)
    run.train()
    torch.testing.assert_close(
        torch.tensor(losses(run)), torch.tensor(_plain_loop(proposal, CHAIN)), rtol=2e-5, atol=0.0
    )


@pytest.mark.parametrize("proposal", PROPOSALS, ids=lambda p: p["proposal"])
def test_an_update_may_be_accumulated(tmp_path: Path, proposal: dict[str, Any]) -> None:
    proposal = {**proposal, "normalize_data_weights": True}
    whole = trainer(tmp_path / "whole", data=trajectories(weighted=True), **proposal)
    whole.train()
    parts = trainer(
        tmp_path / "parts",
        data=trajectories(weighted=True),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **proposal,
    )
    parts.train()
    torch.testing.assert_close(
        torch.tensor(losses(parts)), torch.tensor(losses(whole)), rtol=1e-4, atol=0.0
    )
    for ours, theirs in zip(parts.state.log_history[:7], whole.state.log_history[:7], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"epoch", "grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_transforms_that_look_at_a_batch_see_the_whole_window(tmp_path: Path) -> None:
    chain = ImportanceWeights(trajectory=[weights.SelfNormalize(), weights.TargetESS(0.6)])
    settings = {"proposal": "cached", "sync_every": 1, "importance_weights": chain}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    parts = trainer(
        tmp_path / "parts",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    parts.train()
    torch.testing.assert_close(
        torch.tensor(losses(parts)), torch.tensor(losses(whole)), rtol=1e-4, atol=0.0
    )
    ess = [row["ESS"] for row in parts.state.log_history if "loss" in row]
    # Epochs of 11: two updates of 4 entries, whose exponent is found, then one of 3.
    assert ess[3:5] == pytest.approx([0.6, 0.6], abs=1e-3)


@pytest.mark.parametrize("proposal", PROPOSALS[1:], ids=lambda p: p["proposal"])
@pytest.mark.parametrize(("dropout", "noise"), [(0.0, None), (0.0, 5.0), (0.5, 5.0)])
def test_the_first_weights_are_exactly_one(
    tmp_path: Path, proposal: dict[str, Any], dropout: float, noise: float | None
) -> None:
    decoder = model()
    for layer in decoder.model.layers:
        layer.self_attn.attention_dropout = dropout
    run = trainer(tmp_path, model=decoder, max_steps=1, neftune_noise_alpha=noise, **proposal)
    run.train()
    # The loss has the proposal that the settings name.
    assert run._loss.proposal == proposal["proposal"]
    first = run.state.log_history[0]
    assert first["weight_mean"] == first["weight_max"] == first["ESS"] == 1.0
    # Noise is in the log-probs that are trained, and not in the weights.
    assert (first["kl_approx"] == 0.0) == (noise is None)


@pytest.mark.parametrize("weighted", [False, True])
def test_sft_is_the_likelihood_of_the_assistant_tokens(tmp_path: Path, weighted: bool) -> None:
    data = trajectories(twice=2, weighted=weighted)
    run = trainer(
        tmp_path, data=data, proposal="reference", max_steps=1, per_device_train_batch_size=12
    )
    run.train()
    decoder, total = model(), 0.0
    for trajectory in range(ENTRIES):
        steps = data[data["collector", "traj_ids"] == trajectory]
        ids = steps["tokens", "full"]
        log_prob = log_softmax(decoder(input_ids=ids[None]).logits[0, :-1], -1)
        own = log_prob[torch.arange(len(ids) - 1), ids[1:]]
        if weighted:
            own = own * steps["data_weight"][1:]
        mask = steps["masks", "all_assistant_mask"][1:]
        total -= float(own[mask].mean()) * (2 if trajectory == 2 else 1)
    assert losses(run)[0] == pytest.approx(total / (ENTRIES + 1), rel=1e-5)


@pytest.mark.parametrize("proposal", PROPOSALS, ids=lambda p: p["proposal"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, proposal: dict[str, Any]
) -> None:
    """From a checkpoint within an epoch and a window, at the end of both, and one later."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        **proposal,
    }
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    for after in (2, 3, 4):
        resumed = trainer(tmp_path / "whole", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{after}"))
        assert losses(resumed) == losses(whole)
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_q_without_memory_is_synced_at_every_update(tmp_path: Path) -> None:
    own: dict[str, Any] = {"importance_weights": CHAIN, "max_steps": 4}
    moving = trainer(tmp_path / "moving", proposal="lagged", ema_decay=0.0, **own)
    synced = trainer(tmp_path / "synced", proposal="cached", sync_every=1, **own)
    moving.train()
    synced.train()
    assert losses(moving) == pytest.approx(losses(synced), rel=1e-5)


def test_held_out_likelihood(tmp_path: Path) -> None:
    held_out = trajectories(seed=5, twice=2)
    run = trainer(tmp_path, eval_trajectories=held_out, per_device_eval_batch_size=3)
    rows: list[int] = []
    log_prob_of = run._policy.log_prob
    run._policy.log_prob = lambda batch: rows.append(len(batch)) or log_prob_of(batch)
    metrics = run.evaluate()
    # One of the twelve entries is in two batches.
    assert rows == [3, 3, 3, 3]
    with torch.no_grad():
        log_prob = CausalLMPolicy(model()).log_prob(held_out)
    mask, ids = held_out["masks", "all_assistant_mask"], held_out["collector", "traj_ids"]
    each = [log_prob[mask & (ids == row)] for row in (*range(ENTRIES), 2)]
    by_row = torch.stack([own.mean() for own in each]).mean()
    assert metrics["eval_loss"] == pytest.approx(-float(by_row), rel=1e-5)
    assert metrics["eval_token_loss"] == pytest.approx(-float(torch.cat(each).mean()), rel=1e-5)


def test_graded_scores_choose_the_weights(tmp_path: Path) -> None:
    data = trajectories(twice=2)
    # The policy learns most about what it sees twice.
    best = data["collector", "traj_ids"] == 2
    data.set(STANDARD_SCORE, torch.where(best, 50.0, 0.0))
    auto = ImportanceWeights.auto()
    run = trainer(tmp_path, data=data, proposal="cached", sync_every=3, importance_weights=auto)
    run.train()
    chosen = [row["exponent"] for row in run.state.log_history if "exponent" in row]
    assert len(chosen) == 7 and chosen[:3] == [0.0] * 3 and chosen[3] > 0


def test_trajectories_that_are_not_drawn_judge_the_weights(tmp_path: Path) -> None:
    """The exponent and the weights of the second window against the models of both syncs."""
    data = trajectories(9)
    ids = data["collector", "traj_ids"]
    data.set("multiplicity", (ids < 6).long())
    # The scores of those that are drawn say nothing.
    data.set(STANDARD_SCORE, torch.where(ids == 7, 60.0, 0.0))
    own: dict[str, Any] = {"proposal": "cached", "sync_every": 2, "lr_scheduler_type": "constant"}
    own |= {"importance_weights": ImportanceWeights.auto(), "data": data}
    moved = trainer(tmp_path / "moved", max_steps=2, **own)
    moved.train()
    log_ratio = []
    for trajectory in range(9):
        steps = data[ids == trajectory].exclude("ref_log_prob")
        on = steps["masks", "all_assistant_mask"]
        with torch.no_grad():
            after, before = (CausalLMPolicy(m).log_prob(steps)[on] for m in (moved.model, model()))
        log_ratio.append((after - before).mean())
    x, one = torch.stack(log_ratio), torch.ones(3)
    best = 6 + int(x[6:].argmax())
    data.set(STANDARD_SCORE, torch.where(ids == best, 60.0, 0.0))
    judged = LowerBound().judge(x[6:], one, torch.tensor([60.0 * (i == best) for i in (6, 7, 8)]))
    run = trainer(tmp_path / "run", max_steps=4, **own)
    run.train()
    rows = [row for row in run.state.log_history if "exponent" in row]
    # Updates 3 and 4 are an epoch: each of the six once.
    log_weight, choice = judged(x[:6], torch.ones(6), torch.zeros(6))
    assert rows[1]["exponent"] == 0
    assert rows[2]["exponent"] == float(choice.exponent) > 0
    assert rows[2]["gain_bound"] == pytest.approx(float(choice.gain_bound), rel=1e-3)
    largest = max(row["weight_max"] for row in rows[2:])
    assert largest == pytest.approx(float(log_weight.exp().max()), rel=1e-3)


@pytest.mark.parametrize("given", [False, True])
def test_q_is_run_once_a_window_and_not_while_it_is_the_reference(
    tmp_path: Path, given: bool
) -> None:
    """Trajectories and padded tokens of each pass: the reference of all, then later windows."""
    data = trajectories()
    if given:
        data.set("given_ref_log_prob", torch.where(data["collector", "traj_ids"] > 0, torch.nan, 0))
    run = trainer(tmp_path, data=data, proposal="cached", sync_every=3)
    passes: dict[int, list[torch.Size]] = {}
    log_prob_of = run._policy.log_prob

    def log_prob(batch: TensorDict) -> torch.Tensor:
        if not torch.is_grad_enabled():
            passes.setdefault(run.state.global_step, []).append(batch.batch_size)
        return log_prob_of(batch)

    run._policy.log_prob = log_prob
    run.train()
    number = {at: sum(rows for rows, _ in sizes) for at, sizes in passes.items()}
    assert number == {0: (2 if given else 1) * ENTRIES, 3: ENTRIES, 6: 4}
    # By length there is less padding than in the batches of the epoch.
    assert sum(size.numel() for size in passes[3]) < sum(size.numel() for size in passes[0])


def test_a_window_counts_each_draw_of_a_trajectory(tmp_path: Path) -> None:
    """Cached weights and their logs against a loop over the entries of the window."""
    chain = ImportanceWeights(
        step=[weights.Temperature(9.0)],
        trajectory=[weights.SelfNormalize(), weights.ClipWeight(max=1.1)],
    )
    data = trajectories(5, twice=2)
    own: dict[str, Any] = {
        "data": data,
        "proposal": "cached",
        "sync_every": 2,
        "importance_weights": chain,
        "lr_scheduler_type": "constant",
    }
    moved = trainer(tmp_path / "moved", max_steps=2, **own)
    moved.train()
    run = trainer(tmp_path / "run", max_steps=4, **own)
    run.train()
    log_ratio = []
    for trajectory in range(5):
        steps = data[data["collector", "traj_ids"] == trajectory].exclude("ref_log_prob")
        on = steps["masks", "all_assistant_mask"]
        with torch.no_grad():
            after, before = (CausalLMPolicy(m).log_prob(steps)[on] for m in (moved.model, model()))
        log_ratio.append(float((after - before).mean()))
    # Updates 3 and 4 are the second epoch: its 6 entries, 4 and 2, with one trajectory twice.
    dataset = TrajectoryDataset(data)
    batches = EpochBatches(dataset.sizes, batch_size=4, seed=42).of(1)
    window = [dataset.positions(batch) for batch in batches]
    ratios = torch.tensor([9.0 * log_ratio[entry] for batch in window for entry in batch]).exp()
    mean = float(ratios.mean())
    rows = run.state.log_history[2:4]
    clipped = 0
    for row, batch in zip(rows, window, strict=True):
        raw = [float(torch.tensor(9.0 * log_ratio[entry]).exp()) / mean for entry in batch]
        expected = [min(weight, 1.1) for weight in raw]
        assert row["weight_mean"] == pytest.approx(sum(expected) / len(batch), rel=1e-4)
        assert row["weight_max"] == pytest.approx(max(expected), rel=1e-4)
        clipped += sum(weight > 1.1 for weight in raw)
    # Clips of cached weights are counted over the window.
    assert 0 < clipped < 6
    for row in rows:
        assert row["clip_fraction"] == pytest.approx(clipped / 6)


def test_a_batch_without_entries_counts_for_nothing(tmp_path: Path) -> None:
    rows = []
    for fillers in (0, 2):
        run = trainer(tmp_path / str(fillers), proposal="current", max_steps=1)
        run.train()
        numbers = [[0, 1, 2], *[[] for _ in range(fillers)]]
        batches = [run._collate(run._dataset.__getitems__(entries)) for entries in numbers]
        update, draws = run.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
        assert float(draws) == 3
        parts = [float(run.compute_loss(run.model, x, num_items_in_batch=draws)) for x in update]
        assert parts[1:] == [0.0] * fillers
        rows.append((parts[0], run._measures.collect(run._loss, lambda x: [x])))
    assert rows[0] == rows[1]


def test_workers_do_not_run_the_script_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a script without a main guard: a process that imports it would end with an error."""
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('run again')")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    run, alone = (trainer(tmp_path, max_steps=3, dataloader_num_workers=n) for n in (1, 0))
    run.train()
    alone.train()
    assert losses(run) == losses(alone)


def test_the_reference_is_computed_in_the_first_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They then give the same bits on any device, and the first weights are 1."""
    passes: list[ForwardPass] = []

    def recorded(forward: ForwardPass, **own: Any) -> str | None:
        passes.append(forward)
        return write_reference(forward, **own)

    monkeypatch.setattr(weighted, "write_reference", recorded)
    run = trainer(tmp_path, proposal="current", max_steps=1)
    run.train()
    assert [members for members, _ in passes[0].batches] == [
        sorted(entries) for entries in run._plan.epoch(0)
    ]
