"""Presets of related methods against the equations of their papers, in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from iwsft import EMA, GaussianPolicy, HardSync, ImportanceWeightedMLE, ImportanceWeights, weights
from iwsft.samplers import StepSampler
from iwsft.training import Schedule, fit
from iwsft.trajectory import DATA_WEIGHT, REF_LOG_PROB, SUCCESS_RATE, TRAJ_IDS, from_steps
from tests.oracles import family

SIZES = (5, 1, 9, 3)
STATES, ACTIONS = 6, 7
Equation = Callable[[Tensor, TensorDict], Tensor]


class Table(nn.Module):
    """A policy with its own logits for each state, as a language model has after each prefix."""

    in_keys = ["observation"]

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(STATES, ACTIONS, generator=draw, dtype=torch.float64)
        self.logits = nn.Parameter(logits)

    def log_prob(self, batch: TensorDictBase) -> Tensor:
        every = self.logits[batch["observation"]].log_softmax(-1)
        return every.gather(1, batch["action"][:, None]).squeeze(1)

    def log_prob_and_entropy(self, batch: TensorDictBase, *, top_k: int) -> tuple[Tensor, Tensor]:
        p = self.logits[batch["observation"]].detach().softmax(1).topk(top_k).values
        p = p / p.sum(1, keepdim=True)
        return self.log_prob(batch), -(p * p.log()).sum(1) / torch.tensor(top_k).log()


def make_batch(seed: int = 0) -> TensorDict:
    """Trajectories whose reference is near the policy: ratios on both sides of 1."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    batch = from_steps(
        {
            "observation": torch.randint(STATES, ids.shape, generator=draw),
            "action": torch.randint(ACTIONS, ids.shape, generator=draw),
        },
        ids,
    )
    noise = 0.3 * torch.randn(len(ids), generator=draw, dtype=torch.float64)
    return batch.set(REF_LOG_PROB, (Table().log_prob(batch) + noise).detach())


def make_loss(policy: Table, chain: Any, **settings: Any) -> ImportanceWeightedMLE:
    loss = ImportanceWeightedMLE(
        policy,
        importance_weights=chain,
        functional=False,
        **{"proposal": "current", "reduction": "sum"} | settings,
    )
    loss.awaits_sync = False
    return loss


def parts(batch: TensorDict) -> list[TensorDict]:
    return [batch[batch[TRAJ_IDS] == j] for j in range(len(SIZES))]


CASES: dict[str, tuple[ImportanceWeights, Equation]] = {
    "dft": (ImportanceWeights.dft(), lambda log_p, _: family.dft(log_p)),
    "power": (ImportanceWeights.power(3.0), lambda log_p, _: family.power(log_p, 3.0)),
    "power 1": (ImportanceWeights.power(1.0), lambda log_p, _: family.power(log_p, 1.0)),
    "chord_phi": (ImportanceWeights.chord_phi(), lambda log_p, _: family.chord_phi(log_p)),
    "psft": (
        ImportanceWeights.psft(0.2),
        lambda log_p, part: family.psft(log_p, part[REF_LOG_PROB], 0.2),
    ),
    "minor_sft": (
        ImportanceWeights.minor_sft(0.5),
        lambda log_p, part: family.minor_sft(log_p, part[REF_LOG_PROB], 0.5) * len(log_p),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("normalized", [True, False])
def test_gradient_and_loss_are_those_of_the_equation(name: str, normalized: bool) -> None:
    """The loss is -sum w log p, with w what the equation's gradient gives log p."""
    chain, equation = CASES[name]
    policy, batch = Table(), make_batch()
    truth, value = torch.zeros((), dtype=torch.float64), 0.0
    for part in parts(batch):
        log_p = policy.log_prob(part)
        divisor = len(log_p) if normalized else 1
        of_part = equation(log_p, part).sum() / divisor
        (slope,) = torch.autograd.grad(of_part, log_p, retain_graph=True)
        truth, value = truth + of_part, value + float((slope * log_p.detach()).sum())
    ours = make_loss(policy, chain, length_normalize=normalized)(batch)["loss_iw_mle"]
    torch.testing.assert_close(ours.item(), value, rtol=1e-12, atol=1e-12)
    expected, actual = (torch.autograd.grad(x, policy.logits)[0] for x in (truth, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_the_cases_clip_and_do_not() -> None:
    """Each branch of an equation is met."""
    batch = make_batch()
    ratio = (Table().log_prob(batch) - batch[REF_LOG_PROB]).exp()
    assert bool((ratio > 1.2).any()) and bool((ratio < 0.8).any()) and bool((ratio < 1.2).any())


def test_without_a_reference_none_is_read() -> None:
    policy, batch = Table(), make_batch()
    loss = make_loss(policy, ImportanceWeights.dft())
    alone = loss(batch.exclude(REF_LOG_PROB))
    assert torch.equal(alone["loss_iw_mle"], loss(batch)["loss_iw_mle"])
    assert REF_LOG_PROB not in loss.in_keys
    # Only the diagnostic looks at it.
    assert bool(alone["kl_approx"].isnan()) and not bool(loss(batch)["kl_approx"].isnan())


def test_the_argument_replaces_the_reference_of_the_chain() -> None:
    policy, batch = Table(), make_batch()
    plain = ImportanceWeights(step=[weights.Temperature(1.0)], reduce=None)
    ours, dft = (
        make_loss(policy, chain, reference="none")(batch)["loss_iw_mle"]
        for chain in (plain, ImportanceWeights.dft())
    )
    assert torch.equal(ours, dft)
    assert make_loss(policy, ImportanceWeights.dft(), reference="fixed").needs_reference


def test_a_synced_reference_is_the_policy_at_the_last_sync() -> None:
    policy, batch = Table(), make_batch()
    loss = ImportanceWeightedMLE(
        policy, importance_weights=ImportanceWeights.psft(0.2), proposal="current"
    )
    with pytest.raises(ValueError, match="reference='synced' needs a sync"):
        loss(batch)
    stored = batch[REF_LOG_PROB]
    sync = HardSync(loss, every=2, trajectories=batch)
    before = stored.clone()
    torch.testing.assert_close(before, Table().log_prob(batch).detach())
    for step in range(4):
        synced = step % 2 == 0
        torch.testing.assert_close(stored, loss.log_prob(batch).detach() if synced else before)
        assert (loss(batch)["weight_max"] == 1) == synced
        before = stored.clone()
        with torch.no_grad():
            loss.actor_network_params["logits"].add_(0.1 * torch.randn(STATES, ACTIONS))
        state = dict(sync.state_dict())
        assert sync.step() == (step % 2 == 1)
    now = stored.clone()
    sync.load_state_dict(state)
    assert sync.counter == 1 and torch.equal(stored, before) and not torch.equal(stored, now)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ImportanceWeights(reference="moving"), "reference must be one of"),
        (
            lambda: ImportanceWeights([weights.ClipRatio(0.2, 1.8)], None, reference="none"),
            "ClipRatio.* is for q / pi_ref",
        ),
        (
            lambda: make_loss(Table(), ImportanceWeights.paper_llm(), reference="none"),
            "reduce='sum' weigh by the probability of whole trajectories",
        ),
        (
            lambda: make_loss(Table(), ImportanceWeights.minor_sft(), reference="none"),
            "underflows",
        ),
        (
            lambda: make_loss(Table(), ImportanceWeights.psft(), reference="none"),
            "MaskRatio.* is for q / pi_ref",
        ),
        (
            lambda: make_loss(Table(), ImportanceWeights.chord_phi(), reference="fixed"),
            "Uncertainty.* is for probabilities: it needs reference='none'",
        ),
        (
            lambda: make_loss(Table(), ImportanceWeights.dft(), proposal="reference"),
            "reference='none' has no pi_ref",
        ),
        (
            lambda: make_loss(Table(), ImportanceWeights.psft(), proposal="lagged"),
            "reference='synced' needs proposal='current'",
        ),
        (
            lambda: HardSync(make_loss(Table(), ImportanceWeights.psft()), every=2),
            "trajectories=... goes with proposal='cached' or reference='synced'",
        ),
        (
            lambda: EMA(make_loss(Table(), ImportanceWeights.psft()), decay=0.9),
            "EMA needs proposal='lagged'",
        ),
        (
            lambda: make_loss(Table(), ImportanceWeights.eaft(), proposal="lagged"),
            "the entropy of q needs proposal='current'",
        ),
        (lambda: ImportanceWeights.eaft(0.0), r"EntropyGate\(alpha=0.0\)"),
        (lambda: ImportanceWeights.eaft(top_k=1), r"EntropyGate\(top_k=1\)"),
        (lambda: ImportanceWeights.eaft(top_k=2.5), r"EntropyGate\(top_k=2.5\)"),
        (lambda: ImportanceWeights.minor_sft(0.0), "Sigmoid"),
        (lambda: ImportanceWeights.nft(0.0), "RefuteRatio"),
        (lambda: ImportanceWeights.nft(1.5), "RefuteRatio"),
        (lambda: ImportanceWeights.asft(-0.1), "kl=-0.1 must be finite"),
        (lambda: ImportanceWeights.asft(float("inf")), "kl=inf must be finite"),
        (lambda: ImportanceWeights.by_sign(negative=ImportanceWeights()), "has no bound"),
        (
            lambda: ImportanceWeights.by_sign(
                negative=ImportanceWeights(trajectory=[weights.SelfNormalize()])
            ),
            "has no bound",
        ),
        (
            lambda: make_loss(Table(), ImportanceWeights.topr(), reference="none"),
            "reduce='sum' weigh by the probability",
        ),
        (lambda: ImportanceWeights.psft(0.0), r"psft\(epsilon=0.0\): epsilon must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: ImportanceWeights.power("2"),  # type: ignore[arg-type]
        lambda: ImportanceWeights.psft("0.2"),  # type: ignore[arg-type]
        lambda: ImportanceWeights.asft("0.1"),  # type: ignore[arg-type]
        lambda: ImportanceWeights.eaft(top_k="20"),  # type: ignore[arg-type]
        lambda: ImportanceWeights.authors_control(None, normalize=False),  # type: ignore[arg-type]
        lambda: weights.ClipRatio(max="1"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_number_is_told(build: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"=('\d.*'|None)\)? must be a number"):
        build()


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_a_transform_alone_is_no_chain(sign: str) -> None:
    lone: Any = {sign: weights.ClipWeight(max=1.0)}
    with pytest.raises(TypeError, match=f"{sign}=ClipWeight.* must be a chain"):
        ImportanceWeights.by_sign(**lone)


@pytest.mark.parametrize("place", ["step", "trajectory"])
def test_a_transform_alone_is_no_list(place: str) -> None:
    lone: Any = {place: weights.ClipWeight(max=1.0)}
    with pytest.raises(TypeError, match=rf"{place}=ClipWeight.* must be a list: {place}=\[Clip"):
        ImportanceWeights(**lone)


def test_power_0_is_sft() -> None:
    policy, batch = Table(), make_batch()
    ours = make_loss(policy, ImportanceWeights.power(0.0))(batch)
    sft = make_loss(policy, ImportanceWeights(), proposal="reference")(batch)
    assert torch.equal(ours["loss_iw_mle"], sft["loss_iw_mle"])


def test_negative_data_need_weights_that_vanish() -> None:
    """p and p(1 - p) do; sigmoid(-log ratio) grows as q leaves the answer, and an entropy stays."""
    for chain, fits in (
        (ImportanceWeights.dft(), True),
        (ImportanceWeights.chord_phi(), True),
        (ImportanceWeights.psft(), True),
        (ImportanceWeights.minor_sft(), False),
        (ImportanceWeights.eaft(), False),
    ):
        with nullcontext() if fits else pytest.raises(ValueError, match="d is negative"):
            chain.check_data_weights(torch.tensor([-1.0]), "d", proposal="current")


REWARD = torch.tensor([1.0, -1.0, -1.0, 1.0])
SUCCESS = torch.tensor([0.5, 0.005, 0.995, 0.4], dtype=torch.float64)
BASELINE = -0.25
# Data weight of each trajectory, and its loss as the paper prints it.
SIGNED: dict[str, tuple[ImportanceWeights, Tensor, Callable[[Tensor, Tensor, int], Tensor]]] = {
    "topr": (
        ImportanceWeights.topr(),
        REWARD,
        lambda log_p, old, j: family.topr(log_p, old, float(REWARD[j])),
    ),
    "asymre": (
        ImportanceWeights.asymre(),
        REWARD - BASELINE,
        lambda log_p, old, j: family.asymre(log_p, float(REWARD[j]), BASELINE),
    ),
    **{
        f"nft {epsilon}": (
            ImportanceWeights.nft(epsilon),
            REWARD,
            lambda log_p, old, j, epsilon=epsilon: family.nft(
                log_p, old, bool(REWARD[j] > 0), float(SUCCESS[j].clamp(0.02, 0.98)), epsilon
            ).sum(),
        )
        for epsilon in (1.0, 0.2)
    },
    "asft": (
        ImportanceWeights.asft(0.3),
        torch.ones(4),
        lambda log_p, old, j: family.asft(log_p, old, 0.3).sum(),
    ),
}


@pytest.mark.parametrize("name", SIGNED)
def test_the_gradient_of_right_and_wrong_answers_is_that_of_the_equation(name: str) -> None:
    chain, data_weight, equation = SIGNED[name]
    policy, batch = Table(), make_batch()
    ids = batch[TRAJ_IDS]
    batch.set(DATA_WEIGHT, data_weight[ids]).set(SUCCESS_RATE, SUCCESS[ids])
    proposal = "reference" if name == "asymre" else "current"
    loss = make_loss(policy, chain, length_normalize=False, proposal=proposal)
    truth = torch.zeros((), dtype=torch.float64)
    for j, part in enumerate(parts(batch)):
        truth = truth + equation(policy.log_prob(part), part[REF_LOG_PROB], j)
    ours = loss(batch)["loss_iw_mle"]
    expected, actual = (torch.autograd.grad(x, policy.logits)[0] for x in (truth, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    if not name.startswith("nft"):
        # Their losses, too, are -d w log p; NFT's is the logarithm of another ratio.
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


def test_each_sign_has_its_own_chain_clips_and_comparisons() -> None:
    policy, batch = Table(), make_batch()
    batch.set(DATA_WEIGHT, REWARD[batch[TRAJ_IDS]])
    negative = ImportanceWeights(trajectory=[weights.ClipWeight(max=0.5)])
    clip = weights.ClipWeight(max=1.0)
    positive = ImportanceWeights(trajectory=[clip, weights.SelfNormalize()])
    both = ImportanceWeights.by_sign(positive=positive, negative=negative)
    terms = make_loss(policy, both).terms(batch)
    alone = make_loss(policy, negative).terms(batch)
    wrong = batch[DATA_WEIGHT] < 0
    assert torch.equal(terms.log_weight[wrong], alone.log_weight[wrong])
    assert torch.equal(terms.clipped[wrong], alone.clipped[wrong])
    clipped = make_loss(policy, ImportanceWeights(trajectory=[clip])).terms(batch).clipped
    assert torch.equal(terms.clipped[~wrong], clipped[~wrong])
    assert all(bool(terms.clipped[steps].any()) for steps in (wrong, ~wrong))
    # The mean of the positive weights is 1, whatever the negative ones are.
    weight = terms.log_weight.exp()
    mean = (terms.share * weight)[~wrong].sum() / terms.share[~wrong].sum()
    assert float(mean) == pytest.approx(1.0)
    # Without a negative weight in the batch the first chain weighs all.
    right = make_loss(policy, both).terms(batch.copy().set(DATA_WEIGHT, torch.ones(len(batch))))
    only = make_loss(policy, replace(both, negative=None)).terms(batch.exclude(DATA_WEIGHT))
    assert torch.equal(right.log_weight, only.log_weight)


def test_what_a_chain_reads_is_an_input_of_the_loss() -> None:
    loss = make_loss(Table(), ImportanceWeights.nft())
    assert {SUCCESS_RATE, REF_LOG_PROB} <= set(loss.in_keys)
    batch = make_batch()
    with pytest.raises(KeyError, match="needs 'success_rate' in the batch"):
        loss(batch.set(DATA_WEIGHT, -torch.ones(len(batch))))
    with pytest.raises(KeyError, match="needs 'ref_log_prob' in the batch"):
        make_loss(Table(), ImportanceWeights.asft())(batch.exclude(REF_LOG_PROB))
    assert make_loss(Table(), ImportanceWeights.asft()).needs_reference


def test_baselines_above_the_mean_reward_are_refused() -> None:
    share = torch.tensor([0.5, 0.5, 1.0])
    asymre, topr = ImportanceWeights.asymre(), ImportanceWeights.topr()
    for chain, weight, refused in (
        (asymre, [1.0, 1.0, -0.9], False),
        (asymre, [1.0, 1.0, -1.0], True),
        (topr, [1.0, 1.0, -2.0], False),
    ):
        with pytest.raises(ValueError, match="mean of at most 0") if refused else nullcontext():
            chain.check_data_weights(torch.tensor(weight), "d", proposal="current", share=share)
    with pytest.raises(ValueError, match="proposal='reference' does not compute"):
        topr.check_data_weights(torch.tensor([-1.0]), "d", proposal="reference")


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_the_entropy_gate_reads_the_policy(alpha: float) -> None:
    policy, batch = Table(), make_batch()
    terms = make_loss(policy, ImportanceWeights.eaft(alpha, top_k=4)).terms(batch)
    _, entropy = policy.log_prob_and_entropy(batch, top_k=4)
    torch.testing.assert_close(terms.log_weight.exp(), entropy**alpha)
    gaussian = GaussianPolicy(3, 2)
    with pytest.raises(TypeError, match="GaussianPolicy gives no entropy"):
        make_loss(gaussian, ImportanceWeights.eaft())  # type: ignore[arg-type]


def test_weights_of_one_take_single_steps_whatever_q_is() -> None:
    batch = make_batch()
    batch.set(DATA_WEIGHT, torch.where(batch[TRAJ_IDS] == 0, -0.5, 1.0))
    policies = Table(), Table()
    for policy, proposal in zip(policies, ("current", "reference"), strict=True):
        loss = make_loss(policy, ImportanceWeights.asymre(), proposal=proposal, reduction="mean")
        fit(loss, StepSampler(batch, 8), Schedule(steps=5, lr=0.1, decay="constant"))
    torch.testing.assert_close(policies[0].logits, policies[1].logits, rtol=0, atol=0)
    assert (policies[0].logits != Table().logits).any()
    for chain in (ImportanceWeights.topr(), ImportanceWeights.minor_sft()):
        with pytest.raises(ValueError, match="StepSampler draws single steps"):
            fit(make_loss(Table(), chain), StepSampler(batch, 8), Schedule(steps=5, lr=0.1))
