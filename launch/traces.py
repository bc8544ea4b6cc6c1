"""What reasoning traces do: order of steps, changes of mind, contradictions, labels outside the list; pictures.

    python launch/traces.py --puzzles test.parquet --predictions eval/grpo/predictions.jsonl --out traces/grpo
    python launch/traces.py --puzzles runs/demo/puzzles/train.parquet --out traces/rl \\
        --predictions runs/demo/grpo/rollouts.jsonl
    python launch/traces.py --puzzles reasoning.parquet --out traces/o1        # published reasoning rows
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from data.errors import UserError
from data.files import parse_json
from data.puzzles import read_puzzles
from eval.report.figures import percent
from eval.traces.reading import analyse, known_labels
from eval.traces.report import write_traces
from eval.traces.responses import read_responses
from eval.traces.summary import summarise_traces
from launch.options import command, option


@dataclass(frozen=True, kw_only=True)
class TracesConfig:
    puzzles: str = option(MISSING, "Puzzles, .parquet or .jsonl.")
    predictions: str | None = option(
        None,
        "Responses, .jsonl: predictions (id, prediction), a GRPO run's rollouts.jsonl, or rows with reasoning; "
        "default: the reasoning in --puzzles itself.",
    )
    out: str = option(MISSING, "Folder for traces.json, traces.md, traces.png and steps-<id>.png.")
    show: int = option(6, "How many responses to draw: changes of mind, then the worst, then the best.")
    step: tuple[int, ...] = option((), "Of rollouts, only those of this step; repeatable.")
    accuracy_from: str | None = option(
        None, "traces.json of other responses: measure ease by their accuracy per cell type instead of by these."
    )


@command(TracesConfig)
def main(config: TracesConfig) -> None:
    """Read reasoning traces: steps, order, self-reflection, contradictions (Cell-o1, section 6.2)."""
    if config.show < 0:
        raise UserError(f"--show {config.show}: give 0 or more")
    puzzles = read_puzzles(config.puzzles)
    file = config.predictions or config.puzzles
    responses = read_responses(file, puzzles, config.puzzles, config.step)
    of_type = read_type_accuracy(config.accuracy_from) if config.accuracy_from else None
    known = known_labels(puzzles)
    read = [(response, analyse(response.text, response.puzzle, known)) for response in responses]
    summary = summarise_traces([analysis for _, analysis in read], of_type)
    out = Path(config.out)
    source = {"puzzles": config.puzzles, "predictions": config.predictions, "accuracy_from": config.accuracy_from}
    drawn = write_traces(out, read, summary, show=config.show, file=file, source=source)
    print(
        f"{len(read)} responses, {summary.mean_steps:.1f} steps each, {percent(summary.self_reflection)} change their "
        "mind"
    )
    print(f"wrote {out / 'traces.md'}, traces.json, traces.png and {len(drawn)} step diagrams")


def read_type_accuracy(path: str) -> dict[str, float]:
    """The accuracy per cell type in a traces.json. Raises UserError when it is no such file."""
    if not Path(path).is_file():
        raise UserError(f"--accuracy-from {path}: no such file; launch/traces.py writes a traces.json into its --out")
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))["summary"]["type_accuracy"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--accuracy-from {path}: not a traces.json; launch/traces.py writes one into its --out"
        ) from None


if __name__ == "__main__":
    main()
