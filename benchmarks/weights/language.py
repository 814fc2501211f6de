"""The weights of a language model against its base: those of a run, or of two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from benchmarks.llm import models
from benchmarks.llm.curation import curated_rows
from benchmarks.llm.launch import Launch
from benchmarks.llm.options import BASE, parse
from benchmarks.llm.recipes.chat import read_rows
from benchmarks.llm.run import Run, curated_of, prepare
from benchmarks.runs import CONFIG
from benchmarks.weights.options import Options
from benchmarks.weights.source import Source, check_chain, counted, root_of, tell_scores
from iwsft import checkpoint
from iwsft.chain import Chain
from iwsft.forward_pass import ForwardPass
from iwsft.language.loss import token_loss
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.presets import ImportanceWeights
from iwsft.reference import annotate_reference
from iwsft.trajectory import GIVEN_REF_LOG_PROB, TOKENS, lengths

# Tokens of a forward pass.
_TOKENS = 4096
# Settings of a run that its loss has, too.
_LOSS = ("length_normalize", "normalize_data_weights")


def of_run(options: Options, config: dict[str, Any]) -> Source:
    """Weigh the rows that a run trained on, or other rows, by the model that it saved."""
    assert options.run is not None
    root, algo = root_of(options.run, config), str(config["algo"])
    if algo == BASE:
        raise ValueError(f"{BASE} is the reference itself; pass the run of another algorithm")
    folder = options.run / checkpoint.FOLDER
    if not folder.is_dir():
        way_out = "continue the run with --resume, until it is finished"
        raise FileNotFoundError(f"{options.run} has no checkpoint/ with a model; {way_out}")
    given = replace(parse(["--config", str(options.run / CONFIG)]), out=root)
    run = Run(given.recipe, algo, int(config["seed"]), given, Launch("single"))
    assert run.algorithm is not None
    chain = run.algorithm.importance_weights(given.settings)
    check_chain(chain, algo)
    prepared = prepare(run)
    tokenizer = run.tokenizer(prepared)
    if options.data is None:
        data, of = curated_of(run, prepared, tokenizer), "that the run trained on"
    else:
        rows, of = read_rows(options.data), f"of {_short(options.data)}"
        data = curated_rows(rows, tokenizer, given.settings.max_length, (), seed=run.seed)
    _check_rows(prepared.model, data, trusted=given.trust_remote_code)
    weighted = run.algorithm.proposal != "reference"
    brings = data.get(GIVEN_REF_LOG_PROB, default=None) is not None
    own = ", or that of a row with ref_log_probs" if brings else ""
    notes = () if weighted else (f"{algo} has no weights; these are those of k = 1.",)
    return _weigh(
        f"{run.dataset}, {algo}, seed {run.seed}",
        (str(folder), prepared.model),
        run.load,
        data,
        chain if weighted else ImportanceWeights(),
        (
            "q is the model that the run saved.",
            f"pi_ref is the model that it began with, {_short(prepared.model)}{own}.",
            f"The data are the rows {of}: {counted(data)}.",
            *notes,
        ),
        **{name: getattr(given.settings, name) for name in _LOSS},
    )


def of_models(options: Options) -> Source:
    """Weigh rows by a model and its base, with the weights exp(mean log-ratio)."""
    assert options.model is not None and options.base is not None and options.data is not None
    trusted = options.trust_remote_code
    names = [models.locate(name) for name in (options.model, options.base)]
    tokenizers = [models.load_tokenizer(name, trust_remote_code=trusted) for name in names]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"--model {options.model} and --base {options.base} have tokenizers of other tokens, "
            "so their log-probs can't be compared; pass the base that the model was tuned from"
        )
    data = curated_rows(read_rows(options.data), tokenizers[0], None, (), seed=0)
    _check_rows(names[1], data, trusted=trusted)
    return _weigh(
        f"{_short(options.data)}, {_short(options.model)}",
        (options.model, options.base),
        partial(models.load, trust_remote_code=trusted),
        data,
        ImportanceWeights(),
        (
            f"q is {_short(options.model)}.",
            f"pi_ref is {_short(options.base)}.",
            f"The data are the rows of {_short(options.data)}: {counted(data)}.",
        ),
    )


def _weigh(
    name: str,
    places: tuple[str, str],
    load: Callable[[str], tuple[Any, Any]],
    data: TensorDictBase,
    chain: Chain,
    notes: tuple[str, ...],
    **settings: Any,
) -> Source:
    """Weigh rows by a model and its base, loaded in turns; ``settings`` are those of the loss."""
    tell_scores(data)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def policy(place: str) -> CausalLMPolicy:
        return CausalLMPolicy(load(place)[0].to(device).eval())

    annotate_reference(policy(places[1]), data, rows=_TOKENS)
    q = policy(places[0])
    return Source(
        name=name,
        notes=notes,
        chain=chain,
        make_loss=lambda chain: token_loss(
            q, importance_weights=chain, proposal="current", **settings
        ),
        trajectories=data,
        log_q=ForwardPass(q, data, (), rows=_TOKENS).log_prob().float(),
    )


def _short(place: str) -> str:
    """The name of a model without the folders of a machine."""
    return Path(place).name if Path(place).is_absolute() else place


def _check_rows(place: str, data: TensorDictBase, *, trusted: bool) -> None:
    """Check by the config of the base, before a model is loaded, that it can read the rows."""
    config = models.load_config(place, trust_remote_code=trusted)
    context, longest = models.context_of(config), int(lengths(data).max())
    if context is not None and longest > context:
        raise ValueError(f"a row has {longest} tokens, and {place} reads {context}; leave it out")
    most, known = int(data.get(TOKENS).max()), config.get_text_config().vocab_size
    if most >= known:
        raise ValueError(f"a row has token {most}, and {place} knows {known}; pass another base")
