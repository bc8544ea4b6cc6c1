"""Write a simulated single-cell atlas as a CELLxGENE-schema .h5ad, for trying the pipeline without a download.

python launch/simulate.py --out atlas.h5ad
python launch/simulate.py --out big.h5ad --cells 1000000 --genes 20000 --donors 200
"""

from dataclasses import MISSING, dataclass

from data.atlas.h5ad_writer import COMPRESSIONS, ENCODINGS
from data.atlas.simulate import check_atlas_settings, write_atlas
from data.atlas.stream import stream_atlas, summarise_atlas
from data.errors import UserError
from launch.options import command, option

CELLS_PER_TYPE = 8.0


@dataclass(frozen=True)
class SimulateConfig:
    out: str = option(MISSING, "File to write; ends in .h5ad. An older simulated atlas is replaced.")
    donors: int = option(48, "Number of donors, spread over 6 tissues.")
    seed: int = option(0, "Seed of every random choice; the same seed writes the same file.")
    cells_per_type: float = option(CELLS_PER_TYPE, "Mean number of cells of each type in one batch of one donor.")
    types: int | None = option(None, "Number of cell types; default: all of data/atlas/markers.tsv.")
    noise: float = option(1.0, "Difficulty: 0.5 is easy to annotate, 2 is hard.")
    cells: int | None = option(
        None,
        "Total number of cells, instead of --cells-per-type. Give about one donor per 5,000 cells, as real donors have "
        "a few thousand cells (1,000,000 cells: --donors 200). Memory stays below 500 MB for any number.",
    )
    genes: int | None = option(
        None, "Total number of genes, e.g. 20000: the others are filler genes with invented names; default: no fillers."
    )
    encoding: str = option(
        "csr", "Matrix by rows, by columns, or dense (up to 20 GB before compression).", tuple(ENCODINGS)
    )
    compression: str = option(
        "gzip", "gzip as in CELLxGENE's files, lzf (larger, written faster) or none.", tuple(COMPRESSIONS)
    )

    def __post_init__(self) -> None:
        check_atlas_settings(self.donors, self.seed, self.cells_per_type, self.noise)


@command(SimulateConfig)
def main(config: SimulateConfig) -> None:
    """Write a simulated single-cell atlas as a CELLxGENE-schema .h5ad."""
    if config.cells is not None and config.cells_per_type != CELLS_PER_TYPE:
        raise UserError(
            f"--cells-per-type {config.cells_per_type} and --cells {config.cells} both set how many cells there are; "
            "give one"
        )
    settings = {"cells_per_type": config.cells_per_type, "noise": config.noise, "n_types": config.types}
    layout = {"cells": config.cells, "genes": config.genes}
    layout |= {"encoding": config.encoding, "compression": config.compression}
    if layout == {"cells": None, "genes": None, "encoding": "csr", "compression": "gzip"}:
        summary = summarise_atlas(write_atlas(config.out, config.donors, config.seed, **settings))
    else:
        summary = stream_atlas(config.out, config.donors, config.seed, **settings, **layout)
    print(f"{config.out}: {summary}")


if __name__ == "__main__":
    main()
