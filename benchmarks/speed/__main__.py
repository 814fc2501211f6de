"""Time and memory against the plain way, in one run: ratio above 1 means faster or smaller.

``scaling`` has no peer: it measures cost over the size of the data. ``--json FILE.json`` also
writes its plot, ``FILE.svg``.

Examples:
    iwsft speed control
    iwsft speed control --json control.json
    iwsft speed scaling --json scaling.json
"""

from __future__ import annotations

from benchmarks import stopping


def run() -> None:
    """Read the command line and measure."""
    with stopping.command("tyro", "gymnasium"):
        from benchmarks.options import parse
        from benchmarks.speed.options import Options

        options = parse(Options, "speed", __doc__)
        from benchmarks.speed.job import main

        main(options)


if __name__ == "__main__":
    run()
