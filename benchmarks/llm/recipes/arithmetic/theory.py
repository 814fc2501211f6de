"""What filtering and importance weighting do to a mixture of strategies, in closed form.

Each strategy i is an arm with share p_i and chance of success s_i, as in the paper's Section 3.5.
The forms hold where a strategy stays as good as it was and only the choice among them moves. A
model can do better than that: right texts also teach it to slip less within a strategy.
"""

from __future__ import annotations

from collections.abc import Mapping

Shares = Mapping[str, float]


def mean_score(shares: Shares, success: Shares) -> float:
    """Expected exact match of a policy, sum_i p_i s_i."""
    return sum(share * success[name] for name, share in shares.items())


def after_rounds(shares: Shares, success: Shares, rounds: int) -> dict[str, float]:
    """Shares after fitting the successes ``rounds`` times: p_i s_i^rounds, made to sum to 1.

    One round is SFT in the limit: it copies D+, whose shares are ``p_i s_i / sum_j p_j s_j``.
    iw-SFT with q = p copies D+ too as long as q = pi_ref; once q has moved there, D+ weighted by
    q / pi_ref is what the successes of q would be, so each sync of q after a full fit is one more
    round. With many rounds the best strategy has all.

    Args:
        shares: of the policy that D was drawn from.
        success: chance of success of each strategy.
        rounds: 0 gives ``shares`` back.

    Raises:
        ValueError: rounds below 0, or no strategy that ever succeeds.
    """
    if rounds < 0:
        raise ValueError(f"rounds={rounds}; it counts fits, from 0")
    best = max(success[name] for name, share in shares.items() if share > 0)
    if best <= 0:
        raise ValueError("no strategy in use ever succeeds, so D+ is empty")
    # Relative to the best, which keeps many rounds from vanishing.
    grown = {name: share * (success[name] / best) ** rounds for name, share in shares.items()}
    total = sum(grown.values())
    return {name: share / total for name, share in grown.items()}
