"""Make the bundled dataset ``hopper-replay-mini``, a ninth of the episodes of a larger file.

    python scripts/make_hopper_replay_mini.py hopper-replay.hdf5 \
        iwsft/datasets/data/hopper-replay-mini.hdf5

The middle one of every ``EVERY`` episodes in order of return is written, in the source's order. So
the returns are distributed as in the source, whatever its size. The provenance is written to OUT
with the suffix ``.json``. The same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import h5py
import numpy as np

from iwsft.files import written_whole
from iwsft.fingerprint import file_sha256

EVERY = 9
CHUNK_ROWS = 8192
QUANTILES = (0, 25, 50, 75, 90, 95, 98, 100)
SOURCE = (
    "hopper-replay.hdf5 (D4RL's layout, not D4RL's data): the whole experience of an online SAC "
    "run on Hopper-v4 from scratch (2 x 256 nets, learning rate 3e-4, batch 256, seed 0, 400,000 "
    "steps), which is how D4RL's medium-replay sets were made"
)
LICENCE = "free to use"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    provenance = make(args.source, args.out)
    print(json.dumps(provenance, indent=2))


def make(source: Path, out: Path) -> dict[str, object]:
    """Write the subset and its provenance; return the provenance."""
    with h5py.File(source, "r") as file:
        fields = {key: file[key][()] for key in file}
        attributes = dict(file.attrs)
    ends = np.flatnonzero(fields["terminals"] | fields["timeouts"]) + 1
    starts = np.concatenate([[0], ends[:-1]])
    returns = np.add.reduceat(fields["rewards"].astype(np.float64), starts)
    chosen = np.sort(np.argsort(returns, kind="stable")[EVERY // 2 :: EVERY])
    rows = np.concatenate([np.arange(starts[i], ends[i]) for i in chosen])

    attributes["sources"] = json.dumps(
        [{**part, "episodes": len(chosen)} for part in json.loads(attributes["sources"])]
    )
    with written_whole(out) as partial, h5py.File(partial, "w") as file:
        for key, values in fields.items():
            file.create_dataset(
                key,
                data=values[rows],
                chunks=(min(CHUNK_ROWS, len(rows)), *values.shape[1:]),
                compression="gzip",
                compression_opts=9,
                shuffle=True,
            )
        file.attrs.update(attributes)

    provenance = {
        "source": SOURCE,
        "licence": LICENCE,
        "source_sha256": file_sha256(source),
        "command": f"python scripts/make_hopper_replay_mini.py {source.name} {out.name}",
        "subset": f"middle episode of every {EVERY} in order of return",
        "sha256": file_sha256(out),
        "bytes": out.stat().st_size,
        "quantiles": list(QUANTILES),
        "full": _summary(returns, ends - starts),
        "mini": _summary(returns[chosen], (ends - starts)[chosen]),
    }
    with written_whole(out.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(provenance, indent=2) + "\n")
    return provenance


def _summary(returns: np.ndarray, lengths: np.ndarray) -> dict[str, object]:
    return {
        "episodes": len(returns),
        "steps": int(lengths.sum()),
        "return_mean": round(float(returns.mean()), 1),
        "return_quantiles": np.percentile(returns, QUANTILES).round(1).tolist(),
    }


if __name__ == "__main__":
    main()
