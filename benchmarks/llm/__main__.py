"""Fine-tune a language model by SFT and iw-SFT, and test it.

Examples:
    iwsft llm
    iwsft llm --recipe chat --model my-model --data rows.jsonl --algo sft iw-sft
    iwsft llm --recipe s1k --algo iw-sft --deepspeed zero3_offload --resume
    iwsft llm --config run.yaml
    iwsft evaluate --model runs/my-model --tasks math-500
    iwsft loop --model my-model --prompts prompts.jsonl --verifier math

The defaults below are those of --recipe; --recipe NAME --help prints another's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks import stopping
from benchmarks.commands import COMMANDS

if TYPE_CHECKING:
    from benchmarks.llm.evaluation.options import Options

_FINETUNE = """Fine-tune a language model on your own rows, and test it on rows that are held out.

Examples:
    iwsft finetune --model my-model --data rows.jsonl
    iwsft finetune --model my-model --data rows.jsonl --algo sft iw-sft
    iwsft finetune --model my-model --data rows.parquet --lora-rank 16
    iwsft finetune --model my-model --data a.jsonl --eval-data b.jsonl
"""
_EVALUATION = """Score a language model on MATH-500, AIME, GPQA diamond and GSM8K.

Examples:
    iwsft evaluate --model runs/my-model --tasks math-500 aime-2024
    iwsft evaluate --model runs/my-model --n 16 --temperature 0.7
    iwsft evaluate --model runs/my-model --backend vllm --think-budget 16000
"""


_LOOP = """Sample answers of a language model, verify them, train on the right ones, and again.

Examples:
    iwsft loop --model my-model --prompts prompts.jsonl --verifier math
    iwsft loop --model my-model --prompts openai/gsm8k:train:main \\
        --verifier integer --eval-prompts openai/gsm8k:test:main --rounds 3 --out runs/gsm8k
    iwsft loop --model my-model --prompts prompts.jsonl \\
        --verifier my_module:score --algo sft-q --keep-rounds 1 --start-from base
"""


@stopping.ends_in_one_line()
def main(words: Sequence[str]) -> None:
    """Run the job; an error that a user can mend ends it in one line."""
    from benchmarks.llm.options import BASE, parse
    from benchmarks.runs import check_free, folder_of

    own_rows = tuple(words[:2]) == COMMANDS["finetune"].words
    command = " ".join(["llm", *words[:2]]) if own_rows else "llm"
    options = parse(words, command, _FINETUNE if own_rows else __doc__)
    # Of several processes one has claimed the folders.
    if options.deepspeed is None and not options.resume:
        check_free(
            folder_of(options.out, "llm", options.recipe, algo, seed)
            for algo in options.algo
            # A base that is there is taken as it is.
            if algo != BASE
            for seed in options.seeds
        )
    # Takes seconds to import.
    from benchmarks.llm.job import run_job

    if status := run_job(options):
        raise SystemExit(status)


@stopping.ends_in_one_line()
def evaluate(options: Options) -> None:
    """Evaluate and print the table; an error that a user can mend ends it in one line."""
    options.check()
    from benchmarks.llm.evaluation.run import run, show

    show(run(options))


@stopping.ends_in_one_line()
def loop(words: Sequence[str]) -> None:
    """Run the loop and print its table; an error that a user can mend ends it in one line."""
    from benchmarks.llm.loop.options import parse
    from benchmarks.llm.loop.verifiers import Verifier

    options = parse(words, _LOOP)
    with Verifier(options.verifier) as verifier:
        verifier.start()
        # Takes seconds to import.
        from benchmarks.llm.loop.job import run_rounds

        run_rounds(options, verifier)


def run() -> None:
    """Read the command line and run the job, the evaluation or the loop."""
    # Of several processes one has the last word; while it imports, a signal just ends it.
    if os.environ.get("RANK", "0") == "0":
        stopping.watch()
    plots = "scipy", "matplotlib", "markdown_it"
    with stopping.command("tyro", "joblib", *plots, "transformers", "accelerate"):
        if sys.argv[1:2] == ["loop"]:
            return loop(sys.argv[2:])
        if sys.argv[1:2] != ["evaluate"]:
            return main(sys.argv[1:])
        from benchmarks.llm.evaluation.options import Options
        from benchmarks.options import parse

        return evaluate(parse(Options, "llm evaluate", _EVALUATION, sys.argv[2:]))


if __name__ == "__main__":
    run()
