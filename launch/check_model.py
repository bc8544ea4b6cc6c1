"""Check a checkpoint before it is trained or asked: architecture, head, vocabulary, chat template, end of turn.

python launch/check_model.py checkpoints/SmolLM2-135M-Instruct
python launch/check_model.py checkpoints/mine --json
python launch/check_model.py checkpoints/mine --answer-tokens 0      # without loading the weights
"""

import dataclasses
import json
import os
from dataclasses import dataclass

import click

from data.errors import UserError
from data.options import check_numbers
from data.puzzles import Puzzle, read_puzzles
from launch.options import argument, command, option
from trainer.start.preflight import Row, format_rows

SAMPLE = Puzzle(
    id="sample",
    context="The cells are from the blood of a healthy adult.",
    cells=[
        "CD3D CD3E IL7R TRAC LTB CD2 CD27 MALAT1".split(),
        "MS4A1 CD79A CD79B CD74 HLA-DRA BANK1 TCL1A CD37".split(),
        "LYZ S100A8 S100A9 CD14 FCN1 CST3 VCAN TYROBP".split(),
    ],
    candidates=["B cell", "monocyte", "T cell"],
    answer=["T cell", "B cell", "monocyte"],
    meta={},
)


@dataclass(frozen=True, kw_only=True)
class CheckModelConfig:
    model: str = argument("Folder of a Hugging Face checkpoint.")
    engine: str = option("vllm", "The sampler that will be used with it.", ("vllm", "torch"))
    puzzles: str | None = option(None, "Ask the first puzzle of this file; default: a small one of blood cells.")
    answer_tokens: int = option(64, "Length of the greedy answer that is shown; 0 loads no weights.")
    json: bool = option(False, "Print the table as JSON.")

    def __post_init__(self) -> None:
        check_numbers(self, {"at least 0": ("answer_tokens",)})
        if self.puzzles and not self.answer_tokens:
            raise UserError("--puzzles: no puzzle is asked with --answer-tokens 0; leave one of the two out")


@command(CheckModelConfig)
def main(config: CheckModelConfig) -> None:
    """Say whether a model can be trained here, and how it is asked. Exit code 2 when it cannot."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from trainer.start.model_check import check_model, greedy_answer  # transformers takes seconds to load

    rows = check_model(config.model, config.engine == "vllm")
    bad = any(row.problem for row in rows)
    if config.answer_tokens and not bad:
        puzzle = read_puzzles(config.puzzles)[0] if config.puzzles else SAMPLE
        rows.append(Row(what="a greedy answer", value=repr(greedy_answer(config.model, puzzle, config.answer_tokens))))
    if config.json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1, ensure_ascii=False))
    else:
        click.echo(format_rows(rows))
    if bad:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
