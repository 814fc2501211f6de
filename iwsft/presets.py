"""Importance weights of the paper, of its authors' code, and of related methods, by name.

A preset is a composition of transforms, and nothing else: each can be written out, and changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from iwsft.chain import Chain, check_chain
from iwsft.lower_bound import LowerBound
from iwsft.weights import (
    ClipLogRatio,
    ClipWeight,
    EntropyGate,
    MaskRatio,
    RefuteRatio,
    Scale,
    SelfNormalize,
    Sigmoid,
    Temperature,
    Uncertainty,
    check_number,
)


@dataclass(frozen=True, repr=False)
class ImportanceWeights(Chain):
    """A :class:`~iwsft.chain.Chain`, and those that have a name.

    Of the related methods, log p is that of a token (a step), w its weight with the gradient
    stopped, and q the policy itself (``proposal="current"``).
    """

    @classmethod
    def auto(cls) -> ImportanceWeights:
        """exp(alpha mean log-ratio), where the scores of the data choose alpha: LowerBound."""
        return cls(trajectory=(LowerBound(),))

    @classmethod
    def paper_control(cls, k: float) -> ImportanceWeights:
        """g(x) = k x over the length, no clip (paper, Eq. 11; ``k / |tau|`` of Table 4)."""
        return cls(step=(Temperature(k),))

    @classmethod
    def paper_llm(cls) -> ImportanceWeights:
        """g(x) = 0.1 clip(x, 0.2, 1.8), summed (paper, Appendix C); see :meth:`check_overflow`.

        g(0) = 0.02, so weights do not start at 1.
        """
        return cls(step=(ClipLogRatio(0.2, 1.8), Scale(0.1)), reduce="sum")

    @classmethod
    def authors_control(cls, k: float, normalize: bool) -> ImportanceWeights:
        """exp(k mean log-ratio), clipped to [0, 1000], as in the authors' control code.

        With ``normalize`` their code divides by the sum over the batch and takes a mean again.
        :class:`SelfNormalize` differs from it by the constant 1/B, which Adam undoes.
        """
        last = (SelfNormalize(),) if normalize else ()
        return cls(step=(Temperature(k),), trajectory=(ClipWeight(0.0, 1000.0), *last))

    @classmethod
    def authors_llm(cls) -> ImportanceWeights:
        """exp(mean log-ratio) clipped to [0, 16], as in the authors' language-model code."""
        return cls(trajectory=(ClipWeight(0.0, 16.0),))

    @classmethod
    def dft(cls) -> ImportanceWeights:
        """Dynamic fine-tuning (arXiv 2508.05629): -sg(p) log p, so w = p.

        TRL: ``loss_type="dft"``; ms-swift: ``--enable_dft_loss``; LLaMA-Factory: ``use_dft_loss``.
        """
        return cls.power(1.0)

    @classmethod
    def power(cls, k: float) -> ImportanceWeights:
        """Probability-based objectives (arXiv 2510.00526): (1 - p^k) / k, so w = p^k.

        The gradient is that of the formula; the value of the loss is -sg(p^k) log p. k = 0 is SFT
        (weights of 1), k = 1 is DFT. Authors' code: ``trainer.objective_trans=GeneralFamily-k``.
        """
        return cls(step=(Temperature(k),), reduce=None, reference="none")

    @classmethod
    def chord_phi(cls) -> ImportanceWeights:
        """The weight of CHORD (arXiv 2508.11408) for its part of SFT: w = p (1 - p).

        Trinity-RFT: ``sft_phi``. ms-swift (``chord_enable_phi_function``) does not stop the
        gradient of w, which the paper's code and this one do.
        """
        return cls(step=(Uncertainty(),), reduce=None, reference="none")

    @classmethod
    def psft(cls, epsilon: float = 0.2) -> ImportanceWeights:
        """Proximal SFT (arXiv 2508.17784): -min(r, clip(r, 1 - epsilon, 1 + epsilon)).

        r = p / p_old is the ratio to the policy at the last sync. So w = r, and 0 where
        r > 1 + epsilon. Authors' code: verl with ``clip_ratio`` and advantages of 1.
        """
        check_number(f"psft(epsilon={epsilon!r})", epsilon)
        if not epsilon > 0:
            raise ValueError(f"psft(epsilon={epsilon}): epsilon must be above 0")
        return cls(step=(MaskRatio(max=1.0 + epsilon),), reduce=None, reference="synced")

    @classmethod
    def eaft(cls, alpha: float = 1.0, top_k: int = 20) -> ImportanceWeights:
        """Entropy-adaptive fine-tuning (arXiv 2601.02151): w = (H / log top_k)^alpha.

        H is the entropy of the ``top_k`` likeliest tokens, with probabilities that sum to 1. It
        needs a policy that gives it (:class:`~iwsft.CausalLMPolicy`). LLaMA-Factory:
        ``use_eaft_loss`` (divides by 3.0 for log 20); axolotl: ``use_eaft`` (does not divide).
        """
        return cls(step=(EntropyGate(alpha, top_k),), reduce=None, reference="none")

    @classmethod
    def asft(cls, alpha: float = 0.1) -> ImportanceWeights:
        """Anchored SFT (arXiv 2509.23753): DFT, and ``alpha`` times a KL divergence from pi_ref.

        The paper and its authors' code have KL(pi_ref, p) over the whole vocabulary, which needs
        the logits of pi_ref. This is r - 1 - log r, with r = pi_ref / p of the data's own tokens,
        as in NeMo-RL (``sft.asft``), for which the stored log pi_ref is enough. Its gradient
        passes. Its mean is KL(p, pi_ref) for tokens drawn from p; those of the data are not.
        LLaMA-Factory: ``use_asft_loss``, ``asft_alpha``, of the paper's form.
        """
        return replace(cls.dft(), kl=alpha)

    @classmethod
    def by_sign(
        cls, *, positive: Chain | None = None, negative: Chain | None = None
    ) -> ImportanceWeights:
        """One chain for steps of positive data weight, and one for negative; None: weights of 1.

        The weights of negative data must be bounded.
        """
        check_chain("positive", positive)
        check_chain("negative", negative)
        one = cls(step=(Temperature(0.0),))
        first = positive or replace(one, reference=(negative or one).reference)
        own = (first.step, first.reduce, first.trajectory, first.reference)
        return cls(*own, negative=negative or one, kl=first.kl)

    @classmethod
    def topr(cls) -> ImportanceWeights:
        """Tapered off-policy REINFORCE (arXiv 2503.14286), with the reward R as data weight.

        R >= 0: w = 1. R < 0: w = clip(p / pi_ref, 0, 1) of the whole answer. Sums over tokens need
        ``length_normalize=False``. Trinity-RFT: ``topr``.
        """
        return cls.by_sign(negative=cls(reduce="sum", trajectory=(ClipWeight(0.0, 1.0),)))

    @classmethod
    def asymre(cls) -> ImportanceWeights:
        """Asymmetric REINFORCE (arXiv 2506.20520): w = 1, with R - V as data weight.

        V is a baseline below the mean reward; with a larger one the trainer refuses the data. The
        loss has no lower bound: log p of wrong answers falls without end. Trinity-RFT: ``asymre``.
        """
        return cls.by_sign()

    @classmethod
    def nft(cls, epsilon: float = 1.0) -> ImportanceWeights:
        """Negative-aware fine-tuning (arXiv 2505.18116), with data weights of 1 and -1.

        Right answers: -log r, so w = 1. Wrong: -log max((1 - c r) / (1 - c), epsilon), with
        r = p / pi_ref of a token and c the ``success_rate`` of its prompt, so
        w = c r / max(1 - c r, epsilon (1 - c)). The maximum passes the gradient. w is 0 where
        log r > 10, as in the authors' code (where ``clamp_negative`` is epsilon).
        """
        step = (MaskRatio(max=math.exp(10.0)), RefuteRatio(epsilon))
        return cls.by_sign(negative=cls(step=step, reduce=None))

    @classmethod
    def minor_sft(cls, beta: float = 0.1) -> ImportanceWeights:
        """MinorSFT (arXiv 2408.10642): w = 2 sigmoid(-beta log(p / pi_ref)) of the whole answer.

        Its gradient is that of -logsigmoid(beta log(p / pi_ref)) 2 / beta, and at first that of
        SFT. TorchRL: ``SFTLoss(loss_function="minor_sft")``, whose loss is beta / 2 times this one.
        """
        return cls(reduce="sum", trajectory=(Sigmoid(beta),))
