"""Turn a file of batch-level puzzles into one of the paper's two variants of the task.

python launch/variant.py --puzzles test.parquet --variant cell --out test-cell.parquet   (every cell alone; appendix C)
python launch/variant.py --puzzles test.parquet --variant open --out test-open.parquet   (no candidates; appendix D)
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from data.errors import UserError
from data.puzzles import read_puzzles, write_puzzles
from data.variants import VARIANTS, convert
from launch.options import command, option

NAMES = {"cell": "cell-level", "open": "open-ended"}


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    puzzles: str = option(MISSING, "Batch-level puzzles, .parquet or .jsonl, ours or the published ones.")
    variant: str = option(MISSING, "cell: each cell alone, with all candidates; open: no candidates.", VARIANTS)
    out: str = option(MISSING, "File to write, .parquet or .jsonl. An existing file is replaced.")


@command(VariantConfig)
def main(config: VariantConfig) -> None:
    """Write the cell-level or the open-ended variant of a file of batch-level puzzles."""
    if Path(config.out).suffix not in (".parquet", ".jsonl"):
        raise UserError(f"--out {config.out}: name a file that ends in .parquet or .jsonl")
    if Path(config.out).resolve() == Path(config.puzzles).resolve():
        raise UserError(f"--out {config.out}: is the --puzzles file; name another, so that the batches are kept")
    batches = read_puzzles(config.puzzles)
    try:
        made = convert(batches, config.variant)
    except ValueError as error:
        raise UserError(f"--puzzles {config.puzzles}: {error}") from None
    write_puzzles(config.out, made)
    n_cells = sum(len(puzzle.cells) for puzzle in made)
    print(f"{config.out}: {len(made)} {NAMES[config.variant]} puzzles, {n_cells} cells of {len(batches)} batches")


if __name__ == "__main__":
    main()
