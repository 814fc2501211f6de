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
from benchmarks.llm.contents import changed_source
from benchmarks.llm.curation import curated_rows
from benchmarks.llm.launch import Launch
from benchmarks.llm.options import BASE, parse
from benchmarks.llm.recipes.chat import read_rows
from benchmarks.llm.run import Run, commits_in, curated_of, prepare
from benchmarks.runs import CONFIG
from benchmarks.weights.options import Options
from benchmarks.weights.source import Source, chain_of, notes_of
from iwsft import checkpoint
from iwsft.chain import Chain
from iwsft.forward_pass import ForwardPass
from iwsft.language.loss import token_loss
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import context_of
from iwsft.presets import ImportanceWeights
from iwsft.reference import annotate_reference
from iwsft.trajectory import GIVEN_REF_LOG_PROB, TOKENS, lengths

# Tokens of a forward pass.
_TOKENS = 4096
# Settings of a run that its loss has, too.
_LOSS = ("length_normalize", "normalize_data_weights")


def of_run(options: Options, folder: Path, config: dict[str, Any], out: Path) -> Source:
    """Weigh the rows that a run trained on, or other rows, by the model that it saved."""
    algo, saved = str(config["algo"]), folder / checkpoint.FOLDER
    if algo == BASE:
        raise ValueError(f"{BASE} is the reference itself; pass the run of another algorithm")
    if not saved.is_dir():
        way_out = "continue the run with --resume, until it is finished"
        raise FileNotFoundError(f"{folder} has no checkpoint/ with a model; {way_out}")
    given = replace(parse(["--config", str(folder / CONFIG)]), out=out)
    commits = commits_in(config["settings"])
    run = Run(given.recipe, algo, int(config["seed"]), given, Launch("single"), commits)
    assert run.algorithm is not None
    if path := changed_source(run):
        problem = f"{path} has changed since {folder} was trained, so its weights would be others"
        raise ValueError(f"{problem}; put it back")
    weighted = run.algorithm.proposal != "reference"
    own = run.algorithm.importance_weights(given.settings)
    chain, note = chain_of(algo, own, weighted=weighted)
    prepared = prepare(run)
    tokenizer = run.tokenizer(prepared)
    if options.data is None:
        data, of = curated_of(run, prepared, tokenizer), "that the run trained on"
    else:
        rows, of = read_rows(options.data), f"of {_short(options.data)}"
        data = curated_rows(rows, tokenizer, given.settings.max_length, (), seed=run.seed)
    reference = f"the model that it began with, {_short(prepared.model)}"
    if data.get(GIVEN_REF_LOG_PROB, default=None) is not None:
        reference += ", or that of a row with ref_log_probs"
    _check_rows(prepared.model, data, trusted=given.trust_remote_code)
    notes = notes_of("the model that the run saved", reference, f"the rows {of}", data)
    settings = {name: getattr(given.settings, name) for name in _LOSS}
    name = f"{run.dataset}, {algo}, seed {run.seed}"
    return _weigh(name, notes + note, run.load, (str(saved), prepared.model), data, chain, settings)


def of_models(options: Options) -> Source:
    """Weigh rows by a model and its base, with the weights exp(mean log-ratio)."""
    assert options.model is not None and options.base is not None and options.data is not None
    trusted, names = options.trust_remote_code, (options.model, options.base)
    places = [models.locate(name) for name in names]
    tokenizers = [models.load_tokenizer(place, trust_remote_code=trusted) for place in places]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise ValueError(
            f"--model {options.model} and --base {options.base} have tokenizers of other tokens, "
            "so their log-probs can't be compared; pass the base that the model was tuned from"
        )
    data = curated_rows(read_rows(options.data), tokenizers[0], None, (), seed=0)
    _check_rows(places[1], data, trusted=trusted)
    model, base, rows = map(_short, (*names, options.data))
    notes = notes_of(model, base, f"the rows of {rows}", data)
    load = partial(models.load, trust_remote_code=trusted)
    return _weigh(f"{rows}, {model}", notes, load, names, data, ImportanceWeights(), {})


def _weigh(
    name: str,
    notes: tuple[str, ...],
    load: Callable[[str], tuple[Any, Any]],
    names: tuple[str, str],
    data: TensorDictBase,
    chain: Chain,
    settings: dict[str, Any],
) -> Source:
    """Weigh rows by a model and its base, loaded in turns; ``settings`` are those of the loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def policy(model: str) -> CausalLMPolicy:
        return CausalLMPolicy(load(model)[0].to(device).eval())

    annotate_reference(policy(names[1]), data, rows=_TOKENS)
    q = policy(names[0])
    loss = partial(token_loss, q, proposal="current", **settings)
    return Source(
        name=name,
        notes=notes,
        chain=chain,
        make_loss=lambda chain: loss(importance_weights=chain),
        trajectories=data,
        log_q=ForwardPass(q, data, (), rows=_TOKENS).log_prob().float(),
    )


def _short(place: str) -> str:
    """The name of a model without the folders of a machine."""
    return Path(place).name if Path(place).is_absolute() else place


def _check_rows(place: str, data: TensorDictBase, *, trusted: bool) -> None:
    """Check by the config of the base, before a model is loaded, that it can read the rows."""
    config = models.load_config(place, trust_remote_code=trusted)
    context, longest = context_of(config), int(lengths(data).max())
    if context is not None and longest > context:
        raise ValueError(f"a row has {longest} tokens, and {place} reads {context}; leave it out")
    most, known = int(data.get(TOKENS).max()), config.get_text_config().vocab_size
    if most >= known:
        raise ValueError(f"a row has token {most}, and {place} knows {known}; pass another base")
