"""docs/language.md, as a user would run it: every block of Python, every row, every command."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import tyro
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from benchmarks.commands import COMMANDS
from benchmarks.llm.__main__ import main
from benchmarks.llm.evaluation.options import Options as EvaluationOptions
from benchmarks.llm.evaluation.tasks import TASKS
from benchmarks.llm.options import ALGORITHMS, NAMES, parse
from benchmarks.llm.recipes import RECIPES
from iwsft import ImportanceWeights
from iwsft.datasets.text.rows import read
from iwsft.language.config import _REFUSED
from iwsft.trajectory import lengths
from tests import tiny_qwen2

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "language.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
RESUME = "trainer.train(resume_from_checkpoint=True)"

DATA = Path(__file__).parents[1] / "datasets" / "text" / "data"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with what the page names, tiny, at the places that it names."""
    found = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        # As Qwen2.5 is saved.
        tiny_qwen2.write(found / MODEL, context=4096, dtype=torch.bfloat16)
        _rows(found / "mine.jsonl", 64, seed=0)
        _rows(found / "held-out.jsonl", 6, seed=1)
        (found / "math.jsonl").touch()
        lines = (
            Path(__file__).parents[1] / "datasets" / "text" / "data" / "s1k-1.1-synthetic.jsonl"
        ).read_text()
        s1k = Dataset.from_list([json.loads(line) for line in lines.splitlines()])
        s1k.save_to_disk("simplescaling/s1K-1.1")
        yield found


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """Names that the blocks define, run one after the other.

    ``trainers`` are those that trained, by their folders; ``references`` their ref_log_prob.
    """
    space: dict[str, Any] = {}
    trainers: dict[str, Any] = {}
    references: dict[str, torch.Tensor] = {}
    for number, code in enumerate(BLOCKS, 1):
        if code.strip() == RESUME:
            continue
        exec(compile(code, f"docs/language.md, block {number}", "exec"), space)
        if "trainer.train()" in code:
            run = space["trainer"].args.output_dir
            trainers[run] = space["trainer"]
            references[run] = space["best"]["ref_log_prob"].clone()
    return {**space, "trainers": trainers, "references": references}


def _rows(path: Path, number: int, *, seed: int) -> None:
    random = Random(seed)
    with path.open("w") as file:
        for _ in range(number):
            a, b = random.randrange(50), random.randrange(50)
            messages = [
                {"role": "user", "content": f"{a}+{b}?"},
                {"role": "assistant", "content": f"the answer is {a + b}"},
            ]
            print(json.dumps({"messages": messages, "score": random.random()}), file=file)


def _log_prob(model: Any, trajectories: Any) -> torch.Tensor:
    """log p of the trained tokens of packed trajectories, one at a time; 0 elsewhere."""
    found = []
    with torch.no_grad():
        for part in trajectories.split(lengths(trajectories).tolist()):
            ids = part["tokens", "full"]
            each = log_softmax(model(ids[None]).logits[0, :-1], -1)
            each = each.gather(1, ids[1:, None])[:, 0]
            mask = part["masks", "all_assistant_mask"]
            found.append(torch.cat([torch.zeros(1), torch.where(mask[1:], each, 0.0)]))
    return torch.cat(found)


def _mean(log_prob: torch.Tensor, trajectories: Any) -> torch.Tensor:
    mask = trajectories["masks", "all_assistant_mask"]
    sizes = lengths(trajectories).tolist()
    pairs = zip(log_prob.split(sizes), mask.split(sizes), strict=True)
    return torch.stack([each[on].mean() for each, on in pairs])


def test_the_first_lines_train_on_the_better_half(names: dict[str, Any]) -> None:
    best, every = names["best"], names["data"].trajectories
    score = every["score"][lengths(every).cumsum(0) - 1]
    kept = (score > score.median()).nonzero().squeeze(1)
    assert len(kept) == 32
    assert best["collector", "traj_ids"].unique().equal(kept)
    start = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    reference = _log_prob(start, best)
    found = names["references"]["runs/mine"]
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)
    trained = AutoModelForCausalLM.from_pretrained("runs/mine")
    assert trained.dtype == torch.float32
    better = _mean(_log_prob(trained, best), best) > _mean(reference, best)
    assert better.float().mean() > 0.9


def test_log_lines_contain_what_the_page_names(names: dict[str, Any]) -> None:
    (text,) = re.findall(r"A log line has, besides `loss`: (.*?)\. ", PAGE, flags=re.DOTALL)
    logged = {key for row in names["trainers"]["runs/mine"].state.log_history for key in row}
    measured = logged & {"log_prob", "kl_approx", "unweighted_loss"} | {
        key for key in logged if key.startswith(("ESS", "weight", "clip"))
    }
    # The answers here are equally long, so no correlation with the length is logged.
    assert set(re.findall(r"`(\w+)`", text)) == measured | {"weight_length_corr"}


def test_held_out_rows_are_scored_without_weights(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = (block for block in BLOCKS if "held-out.jsonl" in block)
    space = {**names, "model": AutoModelForCausalLM.from_pretrained("runs/mine")}
    exec(code, space)
    held = space["held_out"]
    log_prob = _log_prob(space["model"], held)
    by_token = -log_prob.sum() / held["masks", "all_assistant_mask"].sum()
    assert float(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(float(by_token), 1e-4)
    by_trajectory = -_mean(log_prob, held).mean()
    found = space["trainer"].evaluate()["eval_loss"]
    assert found == pytest.approx(float(by_trajectory), rel=1e-4)


def test_rows_are_read_as_the_page_writes_them(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "rows.jsonl").write_text(lines)
    chat, checked, weighted = read(tmp_path / "rows.jsonl")
    assert chat.messages is not None and chat.score == 0.9
    assert (checked.completion, checked.correct) == ("4", True)
    assert (weighted.prompt, weighted.weight) == ("2+3=", 0.5)


def test_thoughts_are_padded_and_trained_as_in_the_paper(names: dict[str, Any]) -> None:
    assert names["tokenizer"].pad_token == "<|fim_pad|>"
    thoughts = names["thoughts"].trajectories
    mask = thoughts["masks", "all_assistant_mask"]
    assert len(names["rows"]) == len(lengths(thoughts)) == 20
    text = names["tokenizer"].decode(thoughts["tokens", "full"][mask])
    for part in ("<|im_start|>think\n", "<|im_start|>answer\n", "Answer:", "<|im_end|>"):
        assert text.count(part) == 20


def test_the_mask_is_shown(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in BLOCKS if '"->"' in block)
    exec(code, names)
    prompt, shown = capsys.readouterr().out.split(" -> ")
    answer = re.search(r"the answer is \d+<\|im_end\|>", prompt)
    assert answer is not None and shown.strip() == answer[0]


def test_weights_are_those_that_the_page_says(names: dict[str, Any]) -> None:
    assert names["theirs"] == ImportanceWeights.authors_llm()
    sharper = names["trainers"]["runs/sharper"]
    count = names["data_q"]["multiplicity"][lengths(names["data_q"]).cumsum(0) - 1]
    assert count.bincount().tolist() == [0, 32, 16, 16]
    rows = [row for row in sharper.state.log_history if "weight_mean" in row]
    # There is one line per window, whose mean divided the weights.
    assert len(rows) == 10
    assert [row["weight_mean"] for row in rows] == pytest.approx([1.0] * 10, abs=1e-3)
    assert max(row["weight_max"] for row in rows) > 1.001


def test_adapters_alone_are_trained_and_saved(names: dict[str, Any]) -> None:
    saved = load_file("runs/lora/adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    q = names["trainers"]["runs/lora"]._shards.state_dict()
    assert "lora_" in str(q) and "embed_tokens" not in str(q)


def test_the_plain_loop_makes_the_curated_rows_likelier(names: dict[str, Any]) -> None:
    best = names["best"]
    found = _mean(_log_prob(names["model"], best), best)
    assert bool((found > _mean(best["ref_log_prob"], best)).all())


def test_the_same_lines_continue_after_a_kill(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines run unchanged, but with more checkpoints."""
    assert f"```python\n{RESUME}\n```" in PAGE
    code = BLOCKS[0].replace("logging_steps=10", "save_steps=2")
    assert code != BLOCKS[0]
    (folder / "killed").mkdir()
    for name in ("Qwen", "mine.jsonl"):
        os.symlink(folder / name, folder / "killed" / name)
    monkeypatch.chdir(folder / "killed")
    exec(code, {})
    run = Path("runs/mine")
    uninterrupted = load_file(run / "model.safetensors")
    for late in ("checkpoint-10", "checkpoint-12"):
        shutil.rmtree(run / late)
    (run / "model.safetensors").unlink()
    space: dict[str, Any] = {}
    exec(code.replace("trainer.train()", RESUME), space)
    resumed = load_file(run / "model.safetensors")
    assert space["trainer"].state.global_step == 12
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


def test_the_first_command_fine_tunes_as_it_stands(
    folder: Path, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = next(words for words in _commands() if "finetune" in words)
    assert PAGE.index(shlex.join(words)) < PAGE.index("```")
    main([*COMMANDS["finetune"].words, *words[2:], "--jobs", "1"])
    printed = capsys.readouterr().out
    places = re.findall(r"`(runs/llm/\S*)`", PAGE)
    assert places and all((folder / place / "README.md").is_file() for place in places)
    AutoModelForCausalLM.from_pretrained(places[0])
    assert "base" in printed and "log-likelihood of a token" in printed


def _commands() -> list[list[str]]:
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL).replace("\\\n", "")
    return [shlex.split(line) for line in re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_commands_are_taken(words: list[str]) -> None:
    if words[:2] == ["accelerate", "launch"]:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        return
    assert words[0] == "iwsft"
    assert COMMANDS[words[1]].module == "benchmarks.llm.__main__"
    if words[1] == "evaluate":
        # This machine may have no GPU, and no vLLM.
        here = {"cuda": "cpu", **({} if find_spec("vllm") else {"vllm": "transformers"})}
        words = [here.get(word, word) for word in words]
        options = tyro.cli(EvaluationOptions, args=words[2:])
        options.check()
        assert {name.partition("=")[0] for name in options.tasks} <= TASKS.keys()
        return
    options = parse([*COMMANDS[words[1]].words, *words[2:]])
    if options.deepspeed:
        assert (ROOT / "benchmarks/llm/configs" / f"{options.deepspeed[0]}.yaml").is_file()


def _first_column(header: str) -> list[str]:
    """Names in the first column of the table with this header."""
    (rows,) = re.findall(rf"^\| {header} \|.*\n.*\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    return re.findall(r"^\| `(.*?)`", rows, flags=re.MULTILINE)


def test_tables_name_all_algorithms_and_recipes() -> None:
    assert _first_column("name") == list(ALGORITHMS) == [n for n in NAMES if n != "base"]
    assert _first_column("recipe") == list(RECIPES)


def test_settings_that_are_refused_are_named() -> None:
    refused = PAGE[PAGE.index("## What is refused") :]
    assert all(f"`{name}`" in refused for name in _REFUSED)
