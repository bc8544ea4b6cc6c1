"""Write a simulated single-cell atlas as a CELLxGENE-schema .h5ad, for trying the pipeline without a download."""

from dataclasses import MISSING, dataclass

from data.simulate import write_atlas
from launch.options import command, option


@dataclass(frozen=True)
class Config:
    out: str = option(MISSING, "File to write; ends in .h5ad, an old one is replaced.")
    donors: int = option(48, "Number of donors, spread over 6 tissues.")
    seed: int = option(0, "Seed of every random draw; the same seed writes the same file.")
    cells_per_type: float = option(8.0, "Mean number of cells of each type in one batch of one donor.")
    types: int | None = option(None, "Number of cell types; default all of data/markers.tsv.")
    noise: float = option(1.0, "Difficulty: 0.5 is easy to annotate, 2 is hard.")


@command(Config)
def main(config: Config) -> None:
    """Write a simulated single-cell atlas as a CELLxGENE-schema .h5ad."""
    adata = write_atlas(
        config.out,
        config.donors,
        config.seed,
        cells_per_type=config.cells_per_type,
        noise=config.noise,
        n_types=config.types,
    )
    diseases = set(adata.obs["disease"]) - {"normal"}
    types = set(adata.obs["cell_type"]) - {"unknown"}
    print(
        f"{config.out}: {adata.n_obs} cells x {adata.n_vars} genes, {adata.obs['donor_id'].nunique()} donors, "
        f"{adata.obs['tissue'].nunique()} tissues, {len(types)} cell types, {len(diseases)} diseases besides normal"
    )


if __name__ == "__main__":
    main()
