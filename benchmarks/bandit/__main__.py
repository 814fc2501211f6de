"""Figure 1 of the paper: on a two-armed bandit SFT stops at 5/6, iw-SFT finds the better arm.

Both train on the successes D+ of a uniform pi_ref. D+ has twice as many pulls of the right arm as
of the left, and no failures; SFT copies that ratio. With q = p the weights q / pi_ref favour the
arm that the policy already prefers, until it always pulls the right arm. ``--algo`` trains other
methods, too; those that learn from failures get them.
"""

from __future__ import annotations

from benchmarks import stopping


def run() -> None:
    """Read the command line and run the job."""
    with stopping.command("tyro", "scipy", "matplotlib"):
        from benchmarks.bandit.options import Options
        from benchmarks.options import parse

        options = parse(Options, "bandit", __doc__)
        from benchmarks.bandit.experiment import main

        main(options)


if __name__ == "__main__":
    run()
