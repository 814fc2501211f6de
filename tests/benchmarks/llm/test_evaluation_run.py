"""Evaluations from end to end with a tiny model: files, scores, resume after a kill."""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from small_evaluation import SECRET, TEMPLATE, save_model, settings, tokenizer
from small_loop import lines
from transformers import LlamaForCausalLM

from benchmarks.llm.__main__ import evaluate as main
from benchmarks.llm.__main__ import run as run_command
from benchmarks.llm.evaluation.run import run, show
from benchmarks.llm.options import parse
from iwsft.checkpoint import CheckpointError
from iwsft.language.generation import Completion, TransformersGenerator


def test_files_and_table(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = (f"math-500={data}/math.jsonl", f"gsm8k={data}/gsm8k.jsonl")
    main(settings(model, data, tmp_path, tasks=tasks))
    shown = capsys.readouterr().out
    assert "MATH-500" in shown and "GSM8K" in shown and "avg" in shown
    folder = tmp_path / "tiny" / "gsm8k"
    rows = lines(folder / "generations.jsonl")
    assert [(row["id"], row["sample"]) for row in rows] == [(str(k), 0) for k in range(7)]
    assert all(0 < row["tokens"] <= 40 for row in rows)
    assert all(row["stopped"] or row["tokens"] == 40 for row in rows)
    # A random model says nothing twice, and different things to different questions.
    assert len({row["text"] for row in rows}) == 7
    result = json.loads((folder / "result.json").read_text())
    assert result["questions"] == 7 and result["n"] == 1
    assert 0 <= result["avg_interval"][0] <= result["avg"] <= result["avg_interval"][1] <= 100
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["iwsft"] and config["versions"]["transformers"]
    assert config["settings"]["max_tokens"] == 40
    grades = lines(folder / "grades.jsonl")
    assert [grade["correct"] for grade in grades] == [str(k + 1) for k in range(7)]


def test_models_of_several_runs_are_evaluated_side_by_side(
    model: Path, data: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / "llm" / "chat" / algo / f"seed-{k}" for algo in ("sft", "dft") for k in "01"]
    for one in runs:
        shutil.copytree(model, one / "checkpoint")
        run(settings(one / "checkpoint", data, tmp_path / "out", limit=1, max_tokens=1))
    assert len([*(tmp_path / "out").glob("*/gsm8k/result.json")]) == len(runs)


def test_scores_of_known_generations(model: Path, data: Path, tmp_path: Path) -> None:
    """The command grades given generations, of which 2 of 7 x 3 are right."""
    arguments = settings(model, data, tmp_path, n=3, temperature=1.0)
    run(arguments)
    path = tmp_path / "tiny" / "gsm8k" / "generations.jsonl"
    rows = lines(path)
    for row in rows:
        row["text"] = "nothing"
    # Question 1: 2, 9, 2: right in two of three and by vote. Question 4: 8, 5, 8: in one, not by
    # vote. Question 6: 0, 7 and unclear: in one, and the vote is tied, for the first.
    said = {("1", 0): "2", ("1", 1): "9", ("1", 2): "2.0"}
    said |= {("4", 0): "8", ("4", 1): "5", ("4", 2): "8", ("6", 0): "0", ("6", 1): "7"}
    said[("6", 2)] = "7 or 8"
    for row in rows:
        if (row["id"], row["sample"]) in said:
            row["text"] = f"\\boxed{{{said[row['id'], row['sample']]}}}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = run(settings(model, data, tmp_path, n=3, temperature=1.0, resume=True))
    assert result["avg"] == pytest.approx(100 * (2 / 3 + 1 / 3 + 1 / 3) / 7)
    assert result["maj"] == pytest.approx(100 / 7)
    assert result["pass_at"]["3"] == pytest.approx(100 * 3 / 7)
    assert result["pass_at"]["1"] == pytest.approx(result["avg"])
    # Of three answers with two right, two drawn always hold one; with one right, in 2 of 3 cases.
    assert result["pass_at"]["2"] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 7)
    assert result["no_answer"] == 21 - 8 and result["unclear"] == 1
    assert result["generated_by_this_call"] == 0
    low, high = result["avg_interval"]
    assert 0 <= low < result["avg"] < high <= 100


def test_many_wrong_answers_leave_an_interval(model: Path, data: Path, tmp_path: Path) -> None:
    (result,) = run(settings(model, data, tmp_path, n=2, temperature=1.0, max_tokens=3))
    assert result["avg"] == 0
    # Wilson's upper end for 0 of 7.
    assert result["avg_interval"] == pytest.approx([0, 35.43], abs=0.01)


def test_private_text_stays_out_of_the_files(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(model, data, tmp_path, tasks=(f"gpqa-diamond={data}/gpqa.jsonl",))
    (result,) = run(arguments)
    path = tmp_path / "tiny" / "gpqa-diamond" / "generations.jsonl"
    rows = lines(path)
    assert [row["id"] for row in rows] == ["rec0", "rec1", "rec2"]
    # A model that repeats the choice: only the letter reaches the grades.
    for row in rows:
        row["text"] = f"Answer: A) {SECRET} right"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = run(
        settings(model, data, tmp_path, tasks=(f"gpqa-diamond={data}/gpqa.jsonl",), resume=True)
    )
    assert result["no_answer"] == 0 and result["private"]
    show([result])
    shown = capsys.readouterr()
    assert "ask not to publish" in shown.out and SECRET not in shown.out + shown.err
    others = [each for each in path.parent.iterdir() if each.is_file() and each != path]
    assert len(others) >= 3
    assert all(SECRET not in each.read_text() for each in others)


def test_budget_forcing(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = settings(model, data, tmp_path, max_tokens=5, think_budget=60, waits=1)
    (result,) = run(arguments)
    rows = lines(tmp_path / "tiny" / "gsm8k" / "generations.jsonl")
    assert all(row["text"].startswith("<|im_start|>think\n") for row in rows)
    assert all(row["thinking_tokens"] <= 60 and row["waits"] <= 1 for row in rows)
    assert all(("Final Answer:" in row["text"]) == row["cut"] for row in rows)
    assert all("<|im_start|>answer\n" in row["text"] for row in rows)
    assert result["thinking_cut"] == sum(row["cut"] for row in rows)
    assert result["thinking_tokens_mean"] == pytest.approx(
        sum(row["thinking_tokens"] for row in rows) / 7
    )


def test_without_a_template_the_prompt_is_bare_with_a_warning(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = save_model(tmp_path / "bare", template=None)
    (result,) = run(settings(bare, data, tmp_path / "out", limit=2))
    assert "no chat template" in result["note"]
    show([result])
    assert capsys.readouterr().out.count("no chat template") == 1


@pytest.mark.parametrize("n", [1, 3])
def test_resumed(model: Path, data: Path, tmp_path: Path, n: int) -> None:
    """A half-written line, a batch cut through: the same file at the end."""
    sampling = {"n": n, "temperature": 0.0 if n == 1 else 1.0}
    run(settings(model, data, tmp_path, **sampling))
    path = tmp_path / "tiny" / "gsm8k" / "generations.jsonl"
    whole = path.read_bytes()
    rows = whole.splitlines(keepends=True)
    assert len(rows) == 7 * n
    for cut in (len(whole) - len(rows[-1]), len(whole) - 30, len(b"".join(rows[:5])) + 9, 1, 0):
        path.write_bytes(whole[:cut])
        run(settings(model, data, tmp_path, **sampling, resume=True))
        assert path.read_bytes() == whole


def command(words: list[str], threads: int) -> None:
    """What ``python -m benchmarks.llm`` does, in a process that is killed."""
    torch.set_num_threads(threads)
    sys.argv = ["benchmarks.llm", *words]
    run_command()


def test_killed_and_resumed(
    model: Path, data: Path, tmp_path: Path, forkserver: BaseContext
) -> None:
    """SIGKILL in the middle: the same file at the end."""
    sampling = {"n": 3, "temperature": 1.0, "max_tokens": 300}
    run(settings(model, data, tmp_path / "whole", **sampling))
    whole = (tmp_path / "whole" / "tiny" / "gsm8k" / "generations.jsonl").read_bytes()

    out = tmp_path / "killed"
    path = out / "tiny" / "gsm8k" / "generations.jsonl"
    words = ["evaluate", "--model", str(model), "--tasks", f"gsm8k={data}/gsm8k.jsonl"]
    words += ["--batch-size", "4", "--out", str(out)]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    process = forkserver.Process(target=command, args=(words, torch.get_num_threads()))
    process.start()
    deadline = time.monotonic() + 120
    while not (path.exists() and b"\n" in path.read_bytes()):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    left = path.read_bytes()
    assert whole.startswith(left) and len(left) < len(whole), "it was too fast to be killed"
    assert not (path.parent / "result.json").exists()
    run(settings(model, data, out, **sampling, resume=True))
    assert path.read_bytes() == whole


def test_other_settings_are_not_mixed(model: Path, data: Path, tmp_path: Path) -> None:
    run(settings(model, data, tmp_path / "out"))
    with pytest.raises(FileExistsError, match="pass --resume"):
        run(settings(model, data, tmp_path / "out"))
    kept = (tmp_path / "out" / "tiny" / "gsm8k" / "generations.jsonl").read_bytes()

    def refused(match: str, **others: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            run(settings(others.pop("model", model), data, tmp_path / "out", resume=True, **others))

    refused(r"max_tokens=40 \(now 41\)", max_tokens=41)
    refused("seed=0", seed=1)
    refused("think_budget=None", think_budget=5)
    refused("batch_size=4", batch_size=3)
    # Other weights under the same name; another template; other questions.
    refused("model='", model=save_model(tmp_path / "tuned" / "tiny", seed=1))
    changed = Path(shutil.copytree(model, tmp_path / "template" / "tiny"))
    tokenizer(TEMPLATE.replace("assistant", "model")).save_pretrained(changed)
    refused("prompts='", model=changed)
    other = tmp_path / "other.jsonl"
    other.write_text((data / "gsm8k.jsonl").read_text().replace("#### 7", "#### 8"))
    refused("prompts='", tasks=(f"gsm8k={other}",))
    assert (tmp_path / "out" / "tiny" / "gsm8k" / "generations.jsonl").read_bytes() == kept
    # A moved model is the same model.
    moved = Path(shutil.copytree(model, tmp_path / "moved" / "tiny"))
    assert run(settings(moved, data, tmp_path / "out", resume=True))


@pytest.mark.parametrize("gpu", [False, True])
def test_the_default_is_a_gpu_where_there_is_one(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    given = settings(model, data, Path("runs"))
    job = parse(["--model", str(model)])
    # As in fine-tuning and the loop; what is recorded is the device, so that resuming sees another.
    expected = "cuda" if gpu else "cpu"
    assert given.used_device == given.settings["device"] == job.own_device == expected
    assert replace(given, device="cpu").settings["device"] == "cpu"
    assert replace(given, device="auto").settings["device"] == "auto"
    assert replace(given, device="auto").used_device == expected


def test_damaged_generations_are_named(model: Path, data: Path, tmp_path: Path) -> None:
    run(settings(model, data, tmp_path))
    path = tmp_path / "tiny" / "gsm8k" / "generations.jsonl"
    good = path.read_text().splitlines(keepends=True)
    for damaged in ([good[0], "{\n", *good[2:]], [good[0], *good[2:]], [*good, good[-1]]):
        path.write_text("".join(damaged))
        with pytest.raises(CheckpointError, match=r"generations.jsonl:\d is not the generation"):
            run(settings(model, data, tmp_path, resume=True))


def test_two_processes_in_one_folder(model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "gsm8k"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(FileExistsError, match="another process"):
        run(settings(model, data, tmp_path))


@pytest.mark.parametrize("left", [0, 3])
def test_an_engine_is_closed_once(
    model: Path, data: Path, tmp_path: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the tasks that share it, and where it fails; nothing is opened without questions."""
    opened: list[Engine] = []

    class Engine(TransformersGenerator):
        closed, calls = 0, 0

        def close(self) -> None:
            self.closed += 1

        def _complete(self, *request: Any) -> list[Completion]:
            self.calls += 1
            if self.calls == left:
                raise RuntimeError("out of memory")
            return super()._complete(*request)

    def load(name: str, **_: Any) -> Engine:
        opened.append(Engine(LlamaForCausalLM.from_pretrained(name)))
        return opened[-1]

    monkeypatch.setattr("benchmarks.llm.evaluation.run.load_generator", load)
    tasks = (f"math-500={data}/math.jsonl", f"gsm8k={data}/gsm8k.jsonl")
    options = settings(model, data, tmp_path, tasks=tasks)
    with pytest.raises(RuntimeError, match="memory") if left else nullcontext():
        run(options)
    assert [engine.closed for engine in opened] == [1]
    if not left:
        run(replace(options, resume=True))
        assert len(opened) == 1


def test_a_full_disk_and_after(model: Path, data: Path, tmp_path: Path, full_disk: Any) -> None:
    long: dict[str, Any] = {"max_tokens": 500, "batch_size": 2}
    run(settings(model, data, tmp_path / "whole", **long))
    folder = tmp_path / "whole" / "tiny" / "gsm8k"
    whole = (folder / "generations.jsonl").read_bytes()
    room = len(whole) - 100
    assert room > (folder / "config.json").stat().st_size, "only the generations must not fit"
    with full_disk(room), pytest.raises(OSError, match="no space left to write .*generations"):
        run(settings(model, data, tmp_path / "full", **long))
    run(settings(model, data, tmp_path / "full", **long, resume=True))
    path = tmp_path / "full" / "tiny" / "gsm8k" / "generations.jsonl"
    assert path.read_bytes() == whole
