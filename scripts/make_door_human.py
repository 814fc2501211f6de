"""Make the bundled dataset ``door-human``: 25 human demonstrations of opening a door.

    python scripts/make_door_human.py door_human_demos.npz iwsft/datasets/data/door-human.hdf5

The input has hand_dapg's demonstrations (https://github.com/aravindr93/hand_dapg, Apache-2.0), from
which D4RL's door-human was made, end to end: ``observations`` [N, 39], ``actions`` [N, 28],
``rewards`` [N], ``episode_lengths`` [n], ``init_door_body_pos`` [n, 3]. All rows stay as recorded,
but actions are clipped to [-1, 1], as by the environment and by D4RL. Each demonstration ends with
a timeout. The provenance is written to OUT with the suffix ``.json``. The same input gives the same
bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from iwsft.files import written_whole
from iwsft.fingerprint import file_sha256

SOURCE = (
    "door demonstrations of hand_dapg (Rajeswaran et al., 2018, https://arxiv.org/abs/1709.10087, "
    "https://github.com/aravindr93/hand_dapg), recorded from a human; D4RL's door-human replays "
    "the same"
)
LICENCE = "Apache-2.0"
CHANGES = "actions clipped to [-1, 1]; timeouts at the ends of the demonstrations"
ATTRIBUTES = {
    "env_id": "AdroitHandDoor-v1",
    "env_kwargs": json.dumps({"conventions": "d4rl"}),
    "source": SOURCE,
    "licence": LICENCE,
    "changes": CHANGES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("demonstrations", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(json.dumps(make(args.demonstrations, args.out), indent=2))


def make(demonstrations: Path, out: Path) -> dict[str, Any]:
    """Write the dataset and its provenance; return the provenance.

    Raises:
        ValueError: The lengths do not add up to the rows.
    """
    with np.load(demonstrations) as file:
        demos = {key: file[key] for key in file.files}
    lengths, rows = demos["episode_lengths"], len(demos["observations"])
    if lengths.sum() != rows:
        raise ValueError(
            f"{demonstrations}: 'episode_lengths' add up to {lengths.sum()}, not to {rows} rows"
        )
    timeouts = np.zeros(rows, dtype=bool)
    timeouts[np.cumsum(lengths) - 1] = True
    fields = {
        "observations": demos["observations"].astype(np.float32),
        "actions": demos["actions"].clip(-1.0, 1.0).astype(np.float32),
        "rewards": demos["rewards"].astype(np.float32),
        "terminals": np.zeros(rows, dtype=bool),
        "timeouts": timeouts,
        # The place of the door is a part of the state that no observation has.
        "infos/door_body_pos": np.repeat(demos["init_door_body_pos"], lengths, axis=0),
    }
    with written_whole(out) as partial, h5py.File(partial, "w") as file:
        for key, values in fields.items():
            file.create_dataset(
                key,
                data=values,
                chunks=values.shape,
                compression="gzip",
                compression_opts=9,
                shuffle=True,
            )
        file.attrs.update(ATTRIBUTES)
    provenance = {
        "source": SOURCE,
        "licence": LICENCE,
        "changes": CHANGES,
        "source_sha256": file_sha256(demonstrations),
        "command": f"python scripts/make_door_human.py {demonstrations.name} {out.name}",
        "sha256": file_sha256(out),
        "bytes": out.stat().st_size,
        **_summary(demos),
    }
    with written_whole(out.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(provenance, indent=2) + "\n")
    return provenance


def _summary(demos: dict[str, NDArray[Any]]) -> dict[str, Any]:
    lengths = demos["episode_lengths"]
    returns = np.add.reduceat(demos["rewards"].astype(float), np.cumsum(lengths) - lengths)
    return {
        "demonstrations": len(lengths),
        "steps": int(lengths.sum()),
        "rows_with_clipped_actions": int((np.abs(demos["actions"]) > 1).any(axis=1).sum()),
        "returns": returns.round(1).tolist(),
    }


if __name__ == "__main__":
    main()
