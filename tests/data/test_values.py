"""data/meaning/values.py: which kind of values a layer holds. A build and an inspection say the same."""

import numpy as np
import pytest
from scipy import sparse

from data.build.matrix import open_matrix
from data.errors import UserError
from data.inspection.layers import CALLED, layer_facts
from data.meaning.values import kind_of_stored, value_kind
from tests.data.test_real_files import N_CELLS, atlas, saved


def written(tmp_path, matrix):
    n_genes = matrix.shape[1]
    names, ids = [f"g{i}" for i in range(n_genes)], [f"i{i}" for i in range(n_genes)]
    return saved(tmp_path / "kind.h5ad", atlas(names, ids, matrix))


def kind_of(tmp_path, matrix):
    """The kind of values that a build and an inspection find."""
    path = written(tmp_path, matrix)
    with open_matrix(path) as opened:
        kind = value_kind(opened, np.arange(N_CELLS))
    assert layer_facts(path, "X").values == CALLED.get(kind, kind)
    return kind


def counts_of(genes=300, depth=1500):
    """Counts of cells with differing depths; every cell has one."""
    rng = np.random.default_rng(5)
    level = rng.lognormal(0, 1.5, genes)
    depths = depth * rng.lognormal(0, 0.4, (N_CELLS, 1))
    return rng.poisson(depths * level / level.sum()).astype(np.float64)


def to_one_depth(counts, depth=1e4):
    return depth * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


PANELS = {
    "many genes": (1000, 3000),
    "deep": (300, 1500),
    "shallow": (300, 70),
    "panel": (30, 60),
    "probes": (12, 25),
}
"""Genes and depth: of cells, of spatial panels, of a few probes."""


@pytest.fixture(params=PANELS, scope="module")
def counts(request):
    genes, depth = PANELS[request.param]
    return counts_of(genes, depth)


@pytest.mark.slow(2)
def test_counts_and_fractional_counts(tmp_path, counts):
    assert kind_of(tmp_path, counts) == "counts"
    rng = np.random.default_rng(6)
    for ambient in (
        counts * rng.uniform(0.7, 1.0, counts.shape),  # DecontX
        np.maximum(counts - rng.uniform(0, 0.4, counts.shape), 0),  # SoupX
        np.maximum(counts - 0.3 * (np.arange(N_CELLS)[:, None] % 3 == 0), 0),  # SoupX in some of the cells
        np.where(rng.random(counts.shape) < 0.1, counts / 2, counts),  # alevin: reads of two genes are halved
        counts / 2,
    ):
        assert kind_of(tmp_path, ambient) == "fractional counts"


@pytest.mark.slow(5)
@pytest.mark.parametrize("of", [lambda counts: counts, to_one_depth, lambda counts: to_one_depth(counts, 1e6)])
def test_logarithms_of_any_base(tmp_path, counts, of):
    for log in (np.log1p, lambda x: np.log2(1 + x), lambda x: np.log10(1 + x), np.arcsinh, lambda x: np.arcsinh(x / 5)):
        assert kind_of(tmp_path, log(of(counts))) == "log counts"


@pytest.mark.parametrize("to", ["<f4", "<f2"])
def test_logarithms_of_low_precision(tmp_path, counts, to):
    assert kind_of(tmp_path, np.log1p(to_one_depth(counts)).astype(to)) == "log counts"


def test_logarithms_of_some_of_the_genes(tmp_path):
    counts = counts_of()
    ambient = counts * np.random.default_rng(6).uniform(0.7, 1.0, counts.shape)
    for logged in (
        *(
            log(to_one_depth(counts))[:, :150]
            for log in (np.log1p, lambda x: np.log2(1 + x), lambda x: np.log10(1 + x))
        ),
        np.log1p(ambient),
        np.log1p(to_one_depth(ambient))[:, ::2],  # no sum or unit shows that they were counts
    ):
        assert kind_of(tmp_path, logged) == "log counts"


@pytest.mark.slow(1)
def test_roots_are_neither_counts_nor_logarithms(tmp_path, counts):
    """Their squares are whole, or multiples of one unit in each cell."""
    assert kind_of(tmp_path, np.sqrt(counts)) == "normalised"
    assert kind_of(tmp_path, np.sqrt(counts.astype("f4"))) == "normalised"
    assert kind_of(tmp_path, np.sqrt(to_one_depth(counts))) == "normalised"


@pytest.mark.slow(2)
def test_values_of_one_depth(tmp_path, counts):
    by_median = to_one_depth(counts, np.median(counts.sum(axis=1)))
    for normalised in (to_one_depth(counts), to_one_depth(counts, 1e6), by_median, to_one_depth(counts, 1)):
        assert kind_of(tmp_path, normalised) == "normalised"
    lengths = np.sqrt((counts**2).sum(axis=1, keepdims=True))
    assert kind_of(tmp_path, counts / np.maximum(lengths, 1)) == "normalised"  # cosine normalisation
    model = np.random.default_rng(7).dirichlet(counts.mean(axis=0) + 0.01, N_CELLS)
    assert kind_of(tmp_path, model) == "normalised"  # of scVI: small shares that are all positive


def test_scaled_values_and_residuals_are_refused(tmp_path, counts):
    expected = np.maximum(counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum(), 1e-9)
    residuals = (counts - expected) / np.sqrt(expected + expected**2 / 100)
    for scaled in (residuals, counts - counts.mean(axis=0)):
        path = written(tmp_path, scaled)
        with open_matrix(path) as opened, pytest.raises(UserError, match="holds negative values, so it looks scaled"):
            value_kind(opened, np.arange(N_CELLS))
        assert layer_facts(path, "X").values == "scaled (negative values)"


def test_values_beside_genes_do_not_count(tmp_path, monkeypatch):
    """Antibody tags are centred log ratios; the genes are counts. A build and an inspection both judge the genes."""
    values = np.hstack([counts_of(10), np.random.default_rng(0).normal(size=(N_CELLS, 2))])
    adata = atlas([f"g{i}" for i in range(10)] + ["CD3", "CD19"], [f"i{i}" for i in range(12)], values)
    adata.var["feature_types"] = ["Gene Expression"] * 10 + ["Antibody Capture"] * 2
    matrix = adata.X
    for form in (sparse.csr_matrix, sparse.csc_matrix, lambda m: m.toarray()):
        adata.X = form(matrix)
        path = saved(tmp_path / "a.h5ad", adata)
        assert layer_facts(path, "X").values == "counts"
        with monkeypatch.context() as patch:
            patch.setattr("data.inspection.layers.BUDGET_BYTES", 0)  # rows of csc and dense matrices are not read
            assert layer_facts(path, "X").values == "counts"


def test_stored_values_without_their_cells(tmp_path):
    counts = counts_of()
    for values, kind in {
        "counts": (counts, "counts"),
        "half": (counts / 2, "fractional counts"),
        "soup": (np.where(counts > 5, counts - 0.21, counts), "fractional counts"),
        "log": (np.log1p(to_one_depth(counts)), "log counts"),
        "log2": (np.log2(1 + counts), "log counts"),
        "root": (np.sqrt(counts), "normalised"),
        "cpm": (to_one_depth(counts, 1e6), "normalised"),
    }.values():
        stored = sparse.csr_matrix(values).data
        assert kind_of_stored(stored) == kind
