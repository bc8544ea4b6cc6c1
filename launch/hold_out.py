"""Hold out donors of training puzzles, for --validate of launch/grpo.py and launch/ppo.py: before distill.py and sft.py.

python launch/hold_out.py --puzzles mine/puzzles/train.parquet --out mine/held     # then all on mine/held/train.parquet
python launch/grpo.py --puzzles mine/held/train.parquet --validate mine/held/validation.parquet ...
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from data.build.splits import hold_out_donors
from data.clusters.known import LABELS, read_labels
from data.errors import UserError
from data.files import replacing_folder, write_whole
from data.options import check_numbers
from data.puzzles import read_puzzles, save_rows
from launch.options import command, option


@dataclass(frozen=True, kw_only=True)
class HoldOutConfig:
    puzzles: str = option(MISSING, "Training puzzles that state their donors (train.parquet of launch/build.py).")
    out: str = option(MISSING, "New folder for train.parquet and validation.parquet.")
    fraction: float = option(0.1, "Share of the donors held out, of every tissue; at least one donor, and never all.")
    seed: int = option(0, "Which donors.")

    def __post_init__(self) -> None:
        check_numbers(self, {"above 0 and below 1": ("fraction",)})


@command(HoldOutConfig)
def main(config: HoldOutConfig) -> None:
    """Divide training puzzles by donor into puzzles to train on and puzzles to validate on."""
    if Path(config.out).exists():
        raise UserError(f"--out {config.out}: exists already; name another folder")
    try:
        train, validation = hold_out_donors(read_puzzles(config.puzzles), config.fraction, config.seed)
    except ValueError as error:
        raise UserError(f"--puzzles {config.puzzles}: {error}") from None
    with replacing_folder(Path(config.out)) as partial:
        for name, puzzles in (("train", train), ("validation", validation)):
            save_rows(partial / f"{name}.parquet", [puzzle.to_row() for puzzle in puzzles])
        labels = Path(config.puzzles).parent / LABELS
        if labels.is_file():  # what the model will know: launch/export.py looks for it beside the puzzles
            write_whole(partial / LABELS, read_labels(labels).only_in(train).to_json())
    donors = [len({puzzle.meta["donor"] for puzzle in puzzles}) for puzzles in (train, validation)]
    print(
        f"{config.out}: {len(train)} puzzles of {donors[0]} donors to train on, {len(validation)} of {donors[1]} held out"
    )


if __name__ == "__main__":
    main()
