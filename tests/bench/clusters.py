"""Mean profiles of clusters: ours, from the file in blocks, against scanpy with the whole matrix in memory.

    python -m tests.bench.clusters [--cells 100000 --genes 20000 --clusters 40] [--atlas FILE.h5ad]

A simulated atlas gets a column of clusters. Each side runs in a process of its own and reports CPU seconds, wall seconds
and its peak memory, imports included. scanpy: read_h5ad, normalize_total, log1p, get.aggregate. The means must agree.
Prints a line per side and one RATIO line per comparison, and writes JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

KEY = "bench_cluster"


def ours(atlas: Path, out: Path) -> None:
    from data.clusters.profiles import read_profiles
    from data.clusters.settings import ProfileSettings

    # the constant column makes one sample of all cells, as scanpy has it
    found = read_profiles(atlas, KEY, ProfileSettings(min_cells=1, sample_key="bench_sample"))
    order = np.argsort([profile.cluster for profile in found.profiles])
    np.save(out, np.stack([found.profiles[i].mean for i in order]))


def scanpys(atlas: Path, out: Path) -> None:
    import anndata
    import scanpy

    adata = anndata.read_h5ad(atlas)
    adata.var_names = adata.var["feature_name"].astype(str)
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    means = scanpy.get.aggregate(adata, by=KEY, func="mean")
    means = means[np.argsort(means.obs[KEY].astype(str).to_numpy()), np.argsort(means.var_names.to_numpy(dtype=str))]
    np.save(out, means.layers["mean"])


SIDES = {"ours": ours, "scanpy": scanpys}


def make_atlas(path: Path, cells: int, genes: int, clusters: int) -> Path:
    """A simulated atlas with a column of clusters: the cell types in as many groups."""
    import pandas as pd

    from data.atlas.stream import stream_atlas
    from data.build.h5ad import read_obs
    from data.clusters.annotated import write_annotated

    plain = path.with_name("plain.h5ad")
    stream_atlas(plain, max(6, cells // 5000), 0, cells=cells, genes=genes)
    codes = read_obs(plain, ["cell_type"])["cell_type"].codes % clusters
    names = np.array([f"{i:03d}" for i in range(clusters)], dtype=object)
    columns = {KEY: pd.Categorical.from_codes(codes, categories=names), "bench_sample": np.array(["all"] * len(codes))}
    write_annotated(plain, path, columns, {})
    plain.unlink()
    return path


def measure(side: str, atlas: Path, out: Path) -> dict[str, float]:
    """Seconds and MiB of one side, in a process of its own."""
    words = [sys.executable, "-m", "tests.bench.clusters", "--side", side, "--atlas", str(atlas), "--means", str(out)]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(f"{side:8}{found['cpu']:9.1f} s CPU{found['wall']:9.1f} s wall{found['mib']:9.0f} MiB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("cells", 100_000), ("genes", 20_000), ("clusters", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--atlas", type=Path)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--means", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        start, cpu = time.perf_counter(), time.process_time()
        SIDES[arguments.side](arguments.atlas, arguments.means)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - start, "mib": peak}
        print(json.dumps(spent))
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = (arguments.cells, arguments.genes, arguments.clusters)
        atlas = arguments.atlas or make_atlas(Path(folder) / "atlas.h5ad", *sizes)
        means = {side: Path(folder) / f"{side}.npy" for side in SIDES}
        found = {side: measure(side, atlas, path) for side, path in means.items()}
        difference = float(np.abs(np.load(means["ours"]) - np.load(means["scanpy"])).max())
    print(f"largest difference of a mean: {difference:.2g}")
    assert difference < 1e-4
    Path("runs/bench").mkdir(parents=True, exist_ok=True)
    Path("runs/bench/clusters.json").write_text(
        json.dumps({"sizes": sizes, "difference": difference, **found}, indent=1)
    )
    for name in ("cpu", "mib"):
        ratio = found["scanpy"][name] / found["ours"][name]
        print(f"RATIO scanpy_over_ours_{name} {ratio:.2f} {ratio:.2f} {ratio:.2f}")


if __name__ == "__main__":
    main()
