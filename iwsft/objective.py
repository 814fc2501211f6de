"""Importance-weighted maximum likelihood: the one loss of the library.

``ImportanceWeightedMLE.terms`` gives log p and the weights, and ``summary`` combines them;
``weigh`` is the one place where log-ratios become weights. The other methods read a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor, nn

from iwsft.chain import Chain, Reference, Weights, check_chain, written_by
from iwsft.policies.log_prob import (
    evaluating,
    finite_padding,
    noise_watch,
    step_log_prob_and_entropy,
)
from iwsft.policy_loss import Keys, PolicyLoss
from iwsft.presets import ImportanceWeights
from iwsft.trajectory import MASK, Segments, on_host
from iwsft.validation import check_multiplicity, check_valid_steps
from iwsft.weights import Temperature, exponential

Proposal = Literal["current", "reference", "lagged", "cached"]
LOSS = "loss_iw_mle"
_DIAGNOSTICS = ("ESS", "kl_approx", "clip_fraction", "weight_mean", "weight_max", "log_prob")


class Terms(NamedTuple):
    """Per-step quantities of a batch, each in the batch's layout.

    Attributes:
        segments: Trajectories of the batch.
        share: How much a step counts, see :meth:`ImportanceWeightedMLE.share`.
        log_prob: log p under the policy, with its gradient.
        log_weight: Log-weight of the step's trajectory, after the transforms.
        clipped: Whether a clip changed the weight; None with cached weights.
        reference: log pi_ref; None where the batch has none.
        data_weight: Data weight of the step; None where the batch has none.
    """

    segments: Segments
    share: Tensor
    log_prob: Tensor
    log_weight: Tensor
    clipped: Tensor | None
    reference: Tensor | None
    data_weight: Tensor | None = None


class ImportanceWeightedMLE(PolicyLoss):
    """Weighted maximum likelihood of trajectories, the bound of the paper (Eq. 8 and 9).

    ``loss_iw_mle = - sum_j m_j w_j (sum_i d_ji log p_ji) [/ length_j] / sum_j m_j`` over the
    trajectories j of the batch and their valid steps i. m_j is the multiplicity (how often the
    batch counts the trajectory), w_j = q(tau_j) / pi_ref(tau_j) the importance weight after the
    transforms of ``importance_weights``, d_ji the data weight of the step (any float; it counts in
    the loss alone, not in the diagnostics). m and d are 1 without their keys. Weights carry no
    gradient, and q runs in eval mode, without dropout. With q = pi_ref the loss is that of SFT, and
    on all data that of behaviour cloning.

    Args:
        policy: A TorchRL ``ProbabilisticActor``, or any module with ``log_prob(trajectories)``.
        importance_weights: Transforms from per-step log-ratios to weights; by default exp of the
            mean log-ratio of a trajectory.
        proposal: What q is. ``"lagged"``: a copy of the policy that a q-updater moves
            (:class:`~iwsft.HardSync`, :class:`~iwsft.EMA`, or TorchRL's ``SoftUpdate`` and
            ``HardUpdate``). ``"current"``: the policy itself, without a copy; it runs again in eval
            mode after dropout, other noise or batch normalisation. ``"cached"``: the policy at the
            last sync; :func:`~iwsft.reweight` wrote its weights into the data.
            ``"reference"``: pi_ref, so all log-ratios are 0: SFT.
        reference: What q is divided by, in place of what ``importance_weights`` say:
            ``"fixed"``, ``"synced"`` or ``"none"``, see :class:`~iwsft.chain.Chain`.
        length_normalize: Whether to divide the log-probability of a trajectory by its length.
        reduction: ``"mean"`` as above, ``"sum"`` (no division by sum_j m_j), or ``"none"``: the
            terms per step, in the layout of the batch, that add up to ``"sum"``.
        normalize_data_weights: Whether ``"mean"`` divides by the absolute data weights that were
            drawn, sum_j m_j (mean_i abs d_ji), instead of by sum_j m_j.
        functional: Whether to hold parameters apart from the module, as TorchRL's losses do, and
            not the module itself (for engines that shard it). Then new parameters that the policy
            gets later, as by ``load_state_dict(assign=True)``, are not trained.
        hold_q: Whether a lagged q is part of the loss. If something else holds it, such as
            ``iwsft.language.shards``, weights are read from the batch.

    Input keys: ``in_keys``; where present, ``multiplicity``, ``data_weight`` and the masks that
    ``loss_mask_key`` names (by default ``("collector", "mask")``).

    Output: ``loss_iw_mle``, then detached scalars: ``ESS`` (effective over drawn trajectories, in
    (0, 1]), ``kl_approx`` (mean of log pi_ref - log p; NaN without ``ref_log_prob``),
    ``clip_fraction`` (NaN with cached weights), ``weight_mean``, ``weight_max``, ``log_prob``.
    Means count a trajectory by its multiplicity and give its steps equal shares.
    ``select_out_keys("loss_iw_mle")`` saves their cost.

    Raises:
        KeyError: The batch lacks an entry that the loss needs; the message says how to add it.
        ValueError: Shapes or masks do not fit, :meth:`check_data_weights` refuses a weight, or the
            policy looks across trajectories (the first call compares two).
        OverflowError: A weight is beyond float32. On an accelerator, where looking would cost a
            wait, these two are device-side assertions.
        FloatingPointError: A weight is NaN; or the policy excludes a step that counts (log p is
            -inf), and so does q, so the loss is NaN. An accelerator is not waited for.

    Examples:
        >>> loss = ImportanceWeightedMLE(policy, importance_weights=ImportanceWeights(
        ...     step=[weights.Temperature(1.0)], trajectory=[weights.ClipWeight(max=1000.0)]))
        >>> q = EMA(loss, decay=0.99)
        >>> loss(batch)["loss_iw_mle"].backward(); optimizer.step(); q.step()
    """

    _AcceptedKeys = Keys
    default_keys = Keys
    out_keys = [LOSS, *_DIAGNOSTICS]

    def __init__(
        self,
        policy: nn.Module,
        *,
        importance_weights: Chain | None = None,
        proposal: Proposal = "lagged",
        reference: Reference | None = None,
        length_normalize: bool = True,
        reduction: Literal["none", "mean", "sum"] | None = None,
        normalize_data_weights: bool = False,
        functional: bool = True,
        hold_q: bool = True,
    ) -> None:
        if not callable(getattr(policy, "log_prob", None)):
            raise TypeError(
                f"{type(policy).__name__} needs a method log_prob(trajectories), as "
                "iwsft.GaussianPolicy or torchrl.modules.ProbabilisticActor have"
            )
        if proposal not in get_args(Proposal):
            raise ValueError(f"proposal must be one of {get_args(Proposal)}, not {proposal!r}")
        reduction = "mean" if reduction is None else reduction
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be 'none', 'mean' or 'sum', not {reduction!r}")
        lagged = proposal == "lagged" and hold_q
        super().__init__(policy, lagged=lagged, functional=functional)
        check_chain("importance_weights", importance_weights)
        chain = importance_weights or ImportanceWeights()
        chain = chain if reference is None else replace(chain, reference=reference)
        chain.check_proposal(proposal, policy)
        self.importance_weights = chain
        self.awaits_sync = chain.reference == "synced"
        self.proposal: Proposal = proposal
        self.hold_q = hold_q
        self.length_normalize = length_normalize
        self.reduction = reduction
        self.normalize_data_weights = normalize_data_weights
        self.set_keys()

    @property
    def reads_weights(self) -> bool:
        """Whether batches have the importance weights."""
        return self.proposal == "cached" or (self.proposal == "lagged" and not self.hold_q)

    @property
    def has_lagged_q(self) -> bool:
        """Whether the loss holds a q that an updater moves."""
        return self.proposal == "lagged" and self.hold_q

    @property
    def needs_whole_trajectories(self) -> bool:
        """Whether a batch must have all steps of its trajectories, to weigh them by."""
        chain, live = self.importance_weights, not self.reads_weights
        reduces = any(
            # A lone temperature of 0 makes all weights 1.
            each.reduce and (*each.step, *each.trajectory) != (Temperature(0.0),)
            for each in (chain, chain.negative or chain)
        )
        return live and reduces and self.proposal != "reference"

    @property
    def needs_reference(self) -> bool:
        """Whether batches must have log pi_ref."""
        chain = self.importance_weights
        return chain.kl > 0 or (self.proposal != "reference" and chain.reference != "none")

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Loss and diagnostics of a batch, see the class."""
        result = self.summary(self.terms(tensordict))
        self._clear_weakrefs(
            tensordict, result, "actor_network_params", "target_actor_network_params"
        )
        return result

    def terms(self, batch: TensorDictBase) -> Terms:
        """Log-probabilities and weights of a batch: ``loss.summary(terms)`` is ``loss(batch)``."""
        segments = self.segments(batch)
        share = self.share(batch, segments)
        self._check_batch(batch, segments, share)
        noisy = self.proposal == "current" and noise_watch(self.actor_network, share.device)
        log_prob, entropy = self._log_prob(batch, segments)
        # A multiplicity of 0 does not count, however extreme the step is.
        log_prob = torch.where(share > 0, log_prob, 0)
        data_weight = self.data_weight(batch, segments, share)
        reference = self._entry(batch, self.tensor_keys.ref_log_prob, segments)
        if reference is None and self.importance_weights.kl:
            reference = self.reference(batch, segments)
        if self.reads_weights:
            how = "call iwsft.reweight(trajectories, loss) at the start and at every sync"
            weight = self._needed(batch, self.tensor_keys.importance_weight, segments, how)
            log_weight = torch.where(share > 0, weight.log(), 0)
            return Terms(segments, share, log_prob, log_weight, None, reference, data_weight)
        with torch.no_grad():
            base = reference
            # q is without dropout, as the reference is.
            if self.proposal == "lagged" or (noisy and noisy()):
                log_q, entropy = self._log_prob(batch, segments, q=True)
            elif self.proposal == "current":
                log_q = log_prob
            else:
                log_q = base = torch.zeros_like(log_prob)
            weights = self.weigh(
                batch, log_q, reference=base, entropy=entropy, segments=segments, share=share
            )
        return Terms(segments, share, log_prob, *weights[:2], reference, data_weight)

    @torch.no_grad()
    def weigh(
        self,
        batch: TensorDictBase,
        log_q: Tensor,
        *,
        reference: Tensor | None = None,
        entropy: Tensor | None = None,
        segments: Segments | None = None,
        share: Tensor | None = None,
    ) -> Weights:
        """Weigh a batch by q: the one place where log-ratios become weights.

        Args:
            batch: A packed or padded batch.
            log_q: log q of each step, in the layout of the batch.
            reference: log pi_ref of each step; by default the batch's.
            entropy: Entropy of q at each step, which some weights read.
            segments: Result of :meth:`segments`, if known already, as :meth:`share` is.
            share: How much each step counts.
        """
        segments = self.segments(batch) if segments is None else segments
        share = self.share(batch, segments) if share is None else share
        chain, read = self.importance_weights, {} if entropy is None else {"entropy": entropy}
        if self.awaits_sync:
            raise ValueError("reference='synced' needs a sync: HardSync(loss, every=...)")
        if chain.reference == "none":
            reference = torch.zeros_like(log_q)
        elif reference is None:
            reference = self.reference(batch, segments)
        if self.proposal != "reference" and chain.reference != "none":
            self._check_annotated(batch, share, reference)
        log_ratio = segments.where_valid(log_q - reference)
        for name in chain.from_batch:
            key = vars(self.tensor_keys).get(name, name)
            read[name] = self._needed(batch, key, segments, written_by(name))
        signs = None if chain.negative is None else self.data_weight(batch, segments, share)
        weights = chain(log_ratio, segments, share, read, None if signs is None else signs < 0)
        return weights._replace(log_weight=torch.where(share > 0, weights.log_weight, 0))

    def value(self, terms: Terms, weight: Tensor) -> Tensor:
        """The loss of :meth:`terms` with these importance weights."""
        segments, share, log_prob, *_, data_weight = terms
        count = share if self.length_normalize else share * segments.spread(segments.lengths)
        factor = count if data_weight is None else count * data_weight
        loss = (-factor).to(log_prob.dtype) * weight * log_prob
        if self.importance_weights.kl and terms.reference is not None:
            x = torch.where(share > 0, terms.reference - log_prob, 0)
            loss = loss + count.to(x.dtype) * self.importance_weights.anchor(x)
        if self.reduction == "none":
            return loss
        total = loss.sum(dtype=torch.float64)
        if self.reduction == "mean":
            total = total / self.divisor(share, data_weight)
        return total.to(loss.dtype)

    def summary(self, terms: Terms) -> TensorDict:
        """Loss and diagnostics of :meth:`terms`, the output of a call."""
        weight, draws = exponential(terms.log_weight), terms.share.sum()
        if self.reduction == "mean" and on_host(draws) and float(draws) == 0:
            raise ValueError("every trajectory of the batch has multiplicity 0: it has no mean")
        loss = self.value(terms, weight)
        # Where q excludes an action that the policy excludes, 0 times infinity makes a NaN.
        if on_host(draws) and bool(loss.isnan().any()):
            excluded = terms.segments.index[(terms.log_prob == -torch.inf).flatten()]
            if len(excluded):
                problem = f"log p is -inf at a step of trajectory {int(excluded[0])} of the batch"
                way_out = "mask the step, or take a policy that does not exclude it"
                raise FloatingPointError(f"{problem}, and its weight is 0: {way_out}")
        out = {} if list(self.out_keys) == [LOSS] else self._diagnostics(terms, weight, draws)
        return TensorDict({LOSS: loss, **out}, batch_size=[])

    @torch.no_grad()
    def _diagnostics(self, terms: Terms, weight: Tensor, draws: Tensor) -> dict[str, Tensor]:
        """The outputs beside the loss: float32, from sums in float64."""
        counts = terms.share > 0
        unknown = torch.full_like(weight, torch.nan)
        kl = unknown
        if terms.reference is not None:
            kl = torch.where(counts, terms.reference - terms.log_prob, 0)
        top = torch.where(counts, terms.log_weight, -torch.inf).amax()
        # Over the largest weight, so that squares neither overflow nor all vanish.
        relative = (terms.log_weight - top).clamp(max=0).exp()
        clipped = unknown if terms.clipped is None else terms.clipped
        columns = (relative, relative.square(), kl, clipped, weight, terms.log_prob)
        means = torch.stack(columns).flatten(1).double() @ terms.share.flatten() / draws
        first, second, kl, clipped, mean, log_prob = means.unbind()
        values = torch.stack((first.square() / second, kl, clipped, mean, top.exp(), log_prob))
        return dict(zip(_DIAGNOSTICS, values.float().unbind(), strict=True))

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        """log p of each step under the policy, in the layout of the batch, 0 where masked."""
        return self._log_prob(trajectories, self.segments(trajectories))[0]

    def _log_prob(
        self, batch: TensorDictBase, segments: Segments, *, q: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """log p or log q of each step, and its entropy where weights read it."""
        if segments.mask is not None:
            read = getattr(self.actor_network, "in_keys", None)
            drawn = getattr(self.actor_network, "dist_sample_keys", [self.tensor_keys.action])
            keys = [*batch.keys(True, True)] if read is None else [*read, *drawn]
            batch = finite_padding(batch, segments, keys)
        lagged = q and self.proposal == "lagged"
        with self.network(lagged=lagged) as policy, evaluating(policy if q else None):
            top_k = self.importance_weights.top_k
            log_prob, entropy = step_log_prob_and_entropy(policy, batch, segments.shape, top_k)
        return segments.where_valid(log_prob), entropy

    def segments(self, trajectories: TensorDictBase) -> Segments:
        """The trajectories of a batch; first tokens, which nothing predicts, count as masked."""
        mask: Tensor | None = None
        for key in self._loss_mask_keys():
            valid = trajectories.get(key, default=None)
            if valid is not None:
                if valid.ndim > trajectories.batch_dims and valid.shape[-1] == 1:
                    valid = valid.squeeze(-1)
                mask = valid.bool() if mask is None else mask & valid.bool()
        predicted = getattr(self.actor_network, "predicted", None)
        if mask is not None and predicted is not None:
            mask = mask & predicted(trajectories)
        if mask is None and trajectories.get(MASK, default=None) is not None:
            # Segments would read the mask that the user turned off.
            trajectories = trajectories.exclude(MASK)
        out = Segments.of(trajectories, traj_ids=self.tensor_keys.traj_ids, mask=mask)
        self._check_all_read(trajectories, out, found=mask is not None)
        return out

    def share(self, batch: TensorDictBase, segments: Segments) -> Tensor:
        """How much a step counts: its trajectory's multiplicity over its length, 0 where masked.

        Float64, so that the steps of a trajectory add up to its multiplicity.
        """
        if segments.mask is not None and on_host(segments.mask):
            check_valid_steps(segments, repr(self.loss_mask_key))
        if segments.single_steps:
            share = torch.ones(segments.shape, dtype=torch.float64)
        else:
            share = 1.0 / segments.spread(segments.lengths.clamp(min=1)).double()
        multiplicity = self._entry(batch, self.tensor_keys.multiplicity, segments)
        if multiplicity is not None and on_host(multiplicity):
            check_multiplicity(multiplicity, segments, repr(self.tensor_keys.multiplicity))
        return segments.where_valid(share if multiplicity is None else share * multiplicity)

    def data_weight(
        self, batch: TensorDictBase, segments: Segments, share: Tensor
    ) -> Tensor | None:
        """Data weight of each step, 0 where the step does not count; None if there are none."""
        weight = self._entry(batch, self.tensor_keys.data_weight, segments)
        if weight is not None:
            weight = torch.where(share > 0, weight, 0)
            if on_host(weight):
                self.check_data_weights(weight)
        return weight

    def check_data_weights(self, weight: Tensor, share: Tensor | None = None) -> None:
        """Refuse data weights with which this loss can't be minimised; raises ValueError."""
        name = repr(self.tensor_keys.data_weight)
        self.importance_weights.check_data_weights(weight, name, self.proposal, share)

    def divisor(self, share: Tensor, data_weight: Tensor | None) -> Tensor:
        """What ``"mean"`` divides by: the draws, or the absolute data weights of the draws."""
        if data_weight is None or not self.normalize_data_weights:
            return share.sum(dtype=torch.float64)
        total = (share * data_weight.abs()).sum(dtype=torch.float64)
        # Where all weights of a batch are 0, its loss is 0.
        return total.clamp(min=torch.finfo(torch.float64).tiny)

    def reference(self, batch: TensorDictBase, segments: Segments) -> Tensor:
        """log pi_ref of each step, as the batch holds it."""
        how = "run iwsft.annotate_reference(reference_policy, trajectories) first"
        return self._needed(batch, self.tensor_keys.ref_log_prob, segments, how)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Set the keys that a call needs, in the order of a call without TensorDict."""
        keys = [*getattr(self.actor_network, "in_keys", ()), self.tensor_keys.action]
        keys.append(self.tensor_keys.traj_ids)
        if self.reads_weights:
            keys.append(self.tensor_keys.importance_weight)
        elif self.needs_reference:
            keys.append(self.tensor_keys.ref_log_prob)
        read = [] if self.reads_weights else self.importance_weights.from_batch
        keys += [vars(self.tensor_keys).get(name, name) for name in read]
        self.in_keys = list(dict.fromkeys(keys))
