"""data/meaning/scaled.py: values that were scaled gene by gene are refused; values of expression never are."""

import numpy as np
import pytest
from scipy.stats import rankdata

from data.build.matrix import open_matrix
from data.errors import UserError
from data.inspection.layers import layer_facts
from data.meaning.scaled import Sample, why_no_order
from data.meaning.values import value_kind
from tests.data.test_real_files import N_CELLS, atlas, built, refusal, saved
from tests.data.test_values import counts_of, to_one_depth, written


@pytest.fixture(scope="module")
def logs():
    """Real log counts: 700 cells and 765 genes of blood."""
    scanpy = pytest.importorskip("scanpy")
    return scanpy.datasets.pbmc68k_reduced().raw.X.toarray().astype(np.float64)


def judged(matrix):
    """Why 128 evenly spaced cells of a matrix give no order, or None."""
    cells = matrix[np.linspace(0, len(matrix) - 1, min(len(matrix), 128)).astype(int)]
    columns = [np.flatnonzero(cell > 0) for cell in cells]
    values = [cell[found] for cell, found in zip(cells, columns, strict=True)]
    positive = np.where(cells > 0, cells, 0)
    moments = np.stack([(cells > 0).sum(0), positive.sum(0), (positive**2).sum(0)])
    return why_no_order(Sample(columns, values, moments))


def scalings(values):
    """{what was done: values}"""
    deviation, largest = values.std(axis=0), values.max(axis=0)
    deviation[deviation == 0], largest[largest == 0] = 1, 1
    z = (values - values.mean(axis=0)) / deviation
    return {
        "maximum": values / largest,
        "variance": values / deviation,
        "variance, clipped": np.minimum(values / deviation, 3),
        "z-scores, shifted": z - z.min(),
        "z-scores, from 0": z - z.min(axis=0),
        "z-scores, without negatives": np.maximum(z, 0),
        "ranks": np.argsort(np.argsort(values, axis=0), axis=0).astype(np.float64),
        "mean ranks": rankdata(values, axis=0),
        "found": (values > 0).astype(np.float64),
    }


@pytest.mark.parametrize("done", scalings(np.ones((2, 1))))
def test_real_values_that_were_scaled(logs, done):
    assert judged(scalings(logs)[done])


def test_counts_that_were_scaled():
    many = np.concatenate([counts_of(1000, 3000)] * 3)
    for done in ("maximum", "variance", "z-scores, shifted", "ranks", "found"):
        assert judged(scalings(many)[done]), done
    few = np.concatenate([counts_of(60, 500)] * 3)
    for done in ("maximum", "variance", "found"):
        assert judged(scalings(few)[done]), done


def test_real_values_of_any_genes(logs):
    """Panels of few genes, of the highest, the lowest and the most variable ones, and single types of cells."""
    rng = np.random.default_rng(0)
    assert judged(logs) is None
    for n_genes in (20, 40, 100, 300):
        for _ in range(20):
            assert judged(logs[:, rng.choice(logs.shape[1], n_genes, replace=False)]) is None
    where = logs.sum(axis=0) / np.maximum((logs > 0).sum(axis=0), 1)
    for order in (where, -where, -logs.var(axis=0) / np.maximum(logs.mean(axis=0), 1e-9), (logs > 0).mean(axis=0)):
        for n_genes in (50, 100, 250):
            assert judged(logs[:, np.argsort(order)[:n_genes]]) is None
    before = np.expm1(logs)
    for values in (before, np.log2(1 + before), np.sqrt(before), np.round(logs, 2), logs.astype("f2").astype("f8")):
        assert judged(values) is None
    lengths = rng.lognormal(7.5, 0.8, 1000)
    counts = np.concatenate([counts_of(1000, 3000)] * 3)
    for values in (counts, counts / lengths, to_one_depth(counts / lengths, 1e6), counts / 2, np.log1p(counts)):
        assert judged(values) is None


def test_values_that_say_only_what_was_found(tmp_path):
    counts = counts_of()
    path = written(tmp_path, (counts > 0).astype(np.float64))
    with open_matrix(path) as matrix, pytest.raises(UserError) as error:
        value_kind(matrix, np.arange(N_CELLS))
    assert str(error.value) == (
        f"{path}: layer 'X' holds one value only (1), which says where a gene was found and gives no order of expression; "
        "this file has no other matrix, so add its counts as a layer and name it with --layer, or go on with "
        "--allow-scaled"
    )
    facts = layer_facts(path, "X")
    assert (facts.values, facts.usable) == ("presence only", False)
    with open_matrix(path) as matrix:
        assert value_kind(matrix, np.arange(N_CELLS), allow_scaled=True) == "counts"
    shallow = (np.random.default_rng(0).random((N_CELLS, 300)) < 0.01).astype(np.float64)
    with open_matrix(written(tmp_path, shallow)) as matrix:  # counts above 1 are not to be expected
        assert value_kind(matrix, np.arange(N_CELLS)) == "counts"


def test_the_other_matrix_is_named(tmp_path):
    counts = counts_of(100, 800)
    names = [f"A{i}" for i in range(100)]
    adata = atlas(names, names, counts / np.maximum(counts.max(axis=0), 1))
    adata.layers["counts"] = counts
    path = saved(tmp_path / "a.h5ad", adata)
    message = refusal(path)
    assert "looks scaled for each gene" in message and "choose unscaled values with --layer counts" in message
    assert built(path, layer="counts")[0] and built(path, allow_scaled=True)[0]
    assert layer_facts(path, "X").values == "scaled"
