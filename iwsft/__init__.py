"""iwsft: importance-weighted supervised fine-tuning, for control and for language models.

``import iwsft`` is light; datasets, evaluation and training load with their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from iwsft import datasets as datasets
    from iwsft import weights as weights
    from iwsft.curation import curate as curate
    from iwsft.evaluation import evaluate as evaluate
    from iwsft.objective import ImportanceWeightedMLE as ImportanceWeightedMLE
    from iwsft.policies import CausalLMPolicy as CausalLMPolicy
    from iwsft.policies import GaussianPolicy as GaussianPolicy
    from iwsft.policies import MixturePolicy as MixturePolicy
    from iwsft.presets import ImportanceWeights as ImportanceWeights
    from iwsft.proposals import EMA as EMA
    from iwsft.proposals import HardSync as HardSync
    from iwsft.proposals import reweight as reweight
    from iwsft.reference import annotate_reference as annotate_reference
    from iwsft.trained_policy import load_policy as load_policy

# Where the public names live; a module maps to itself.
_NAMES = {
    "curation": "curate",
    "datasets": "datasets",
    "evaluation": "evaluate",
    "objective": "ImportanceWeightedMLE",
    "policies": "CausalLMPolicy GaussianPolicy MixturePolicy",
    "presets": "ImportanceWeights",
    "proposals": "EMA HardSync reweight",
    "reference": "annotate_reference",
    "trained_policy": "load_policy",
    "weights": "weights",
}
_PUBLIC = {name: where for where, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'iwsft' has no attribute {name!r}; it has {__all__}")
    module = import_module(f"iwsft.{_PUBLIC[name]}")
    value = module if name == _PUBLIC[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
