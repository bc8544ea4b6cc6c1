"""Values from which nobody can tell which of two genes a cell expresses more: they were scaled gene by gene.

Each rule asks for what values of expression never show. G genes.
"""

from dataclasses import dataclass

import numpy as np

FEWEST_CELLS = 64
"""Fewer sampled cells tell nothing."""
FEWEST_EXPRESSED = 5
"""Sampled cells that must express a gene, for the gene to be judged."""
EXPECTED_ABOVE_1 = 20
"""So many counts above 1 must be expected, for their absence to mean that a value says only that a gene was found."""
UNIT_GENES, UNIT_SHARE, UNIT_WIDTH, DISTINCT_SHARE = 20, 0.7, 0.1, 0.95
"""Thresholds of _has_variance_1."""
MANY_VALUES, SAME_MAXIMUM, MAXIMUM_WIDTH = 10, 0.8, 1e-4
"""Genes with MANY_VALUES distinct values hardly have one maximum; SAME_MAXIMUM: share of those that have."""
FEW_AT_MAXIMUM, AT_MAXIMUM = 10, 0.1
"""Thresholds of _reach_one_maximum: genes, and their share."""
UNITS_JUDGED, UNIT_VALUES, OWN_UNIT, UNITS_DIFFER, WHOLE_WIDTH = 300, 3, 0.9, 0.2, 0.02
"""Thresholds of _has_own_units: genes that are looked at, distinct values of each, share that is in units of its own, the
standard deviation of the logarithms of the units, how far a ratio may be from a whole number."""
LARGEST_RATIO = 1000
"""Larger ratios have no digits left behind the point."""
RARE_IS_HIGH, ORDER_GENES, FEW_ORDER_GENES = -0.6, 200, 50
"""Where genes that more cells express are expressed, their values are higher. A rank correlation below RARE_IS_HIGH over
ORDER_GENES genes says the opposite; FEW_ORDER_GENES are enough where another sign speaks for scaling."""
NEARLY_ALL, SAME_MEAN = 0.95, 0.2
"""Where this share of the values is above 0, genes whose means differ by less than SAME_MEAN of the standard deviation of
a gene were centred."""


@dataclass(frozen=True)
class Sample:
    """The values > 0 of some cells."""

    columns: list[np.ndarray]
    values: list[np.ndarray]
    """Of each cell: the genes that it expresses, and how much."""
    moments: np.ndarray
    """[3, G] number, sum and sum of squares of each gene's values."""

    def __len__(self) -> int:
        return len(self.values)


def why_no_order(sample: Sample) -> str | None:
    """What is wrong with values that give no order of expression, as a predicate of the layer; else None."""
    pooled = np.concatenate(sample.values) if len(sample) else np.zeros(0)
    if len(sample) < FEWEST_CELLS or not len(pooled):
        return None
    if pooled.min() == pooled.max():
        return (
            f"holds one value only ({pooled[0]:g}), which says where a gene was found" if _is_presence(sample) else None
        )
    number, total, squares = sample.moments
    n_cells, often = len(sample), number >= FEWEST_EXPRESSED
    whole = bool((pooled == np.rint(pooled)).all())
    if often.sum() < UNIT_GENES or whole and len(pooled) < NEARLY_ALL * often.sum() * n_cells:
        return None  # counts
    mean = total[often] / n_cells
    deviation = np.sqrt(np.maximum(squares[often] - n_cells * mean**2, 0) / (n_cells - 1))
    if number[often].sum() > NEARLY_ALL * often.sum() * n_cells and mean.std() < SAME_MEAN * np.median(deviation):
        if not whole or _all_differ(sample, often):
            return "looks scaled (all its genes have one mean)"
    if whole:
        return None
    if _has_variance_1(sample):
        return "looks scaled (its genes have the variance 1 and no cell has a value twice)"
    rare_is_high = _rank_correlation(number[often], total[often] / number[often]) < RARE_IS_HIGH
    if rare_is_high and often.sum() >= ORDER_GENES:
        return "looks scaled for each gene (the fewer cells express a gene, the higher are its values)"
    distinct, largest, units = _of_genes(sample, often)
    many = largest[distinct >= MANY_VALUES]
    if _share_of_one(many) >= SAME_MAXIMUM:
        return "looks scaled for each gene (nearly all genes have one maximum)"
    if len(many) and _reach_one_maximum(sample, many):
        return "looks scaled for each gene (many genes reach the largest value of all, each in about one cell)"
    in_units = units[(distinct >= UNIT_VALUES) & ~np.isnan(units)]
    own = in_units[in_units > 0]
    if len(in_units) >= UNIT_GENES and len(own) >= OWN_UNIT * len(in_units) and np.log(own).std() > UNITS_DIFFER:
        one_maximum = _share_of_one(largest[distinct >= UNIT_VALUES]) >= UNIT_SHARE
        one_variance = (np.abs(deviation - 1) <= UNIT_WIDTH).mean() >= UNIT_SHARE
        # a count that was divided by the largest count of its gene
        of_largest = pooled.max() <= 1 and (np.abs(1 / own - np.rint(1 / own)) <= WHOLE_WIDTH).mean() >= OWN_UNIT
        if one_maximum or one_variance or of_largest or rare_is_high and often.sum() >= FEW_ORDER_GENES:
            return "looks scaled for each gene (each gene holds multiples of a number of its own)"
    return None


def _is_presence(sample: Sample) -> bool:
    """Whether so many genes are found so often that counts above 1 would be among them (Poisson)."""
    found = np.minimum(sample.moments[0] / len(sample), 1 - 0.5 / len(sample))
    rate = -np.log1p(-found)
    return float((1 - np.exp(-rate) * (1 + rate)).sum() * len(sample)) > EXPECTED_ABOVE_1


def _has_variance_1(sample: Sample) -> bool:
    """Whether genes were scaled to variance 1 without being centred, so that no value is negative.

    Two signs must hold together. First, values do not repeat within a cell. (Counts repeat; log TPM do not, so this
    sign alone is not enough.) Second, nearly all genes that half of the cells express have standard deviation 1; genes
    on a log scale do not.
    """
    distinct = [len(np.unique(values)) / max(1, len(values)) for values in sample.values]
    often = 2 * sample.moments[0] >= len(sample)
    if often.sum() < UNIT_GENES or np.median(distinct) < DISTINCT_SHARE:
        return False
    _, total, squares = sample.moments[:, often]
    deviation = np.sqrt(np.maximum(squares - total**2 / len(sample), 0) / (len(sample) - 1))
    return float((np.abs(deviation - 1) <= UNIT_WIDTH).mean()) >= UNIT_SHARE


def _values_of(sample: Sample, judged: np.ndarray) -> list[np.ndarray]:
    """The distinct values of at most UNITS_JUDGED of the judged genes, evenly spaced. judged: [G] bool."""
    genes = np.flatnonzero(judged)
    genes = genes[:: -(-len(genes) // UNITS_JUDGED)]
    columns, values = np.concatenate(sample.columns), np.concatenate(sample.values)
    kept = np.isin(columns, genes)
    columns, values = columns[kept], values[kept]
    order = np.argsort(columns, kind="stable")
    bounds = np.searchsorted(columns[order], genes)
    return [np.unique(part) for part in np.split(values[order], bounds[1:])]


def _all_differ(sample: Sample, often: np.ndarray) -> bool:
    """Whether no gene has a value twice, as ranks over all cells have not."""
    numbers = sample.moments[0, np.flatnonzero(often)[:: -(-int(often.sum()) // UNITS_JUDGED)]]
    distinct = [len(values) for values in _values_of(sample, often)]
    return sum(distinct) >= DISTINCT_SHARE * numbers.sum()


def _of_genes(sample: Sample, often: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([g] distinct values, largest value, unit) of some genes. Unit: 0 where there is none, NaN where it is unclear."""
    found = _values_of(sample, often)
    units = [_unit(values) for values in found]
    return np.array([len(v) for v in found]), np.array([v[-1] for v in found]), np.array(units)


def _unit(distinct: np.ndarray) -> float:
    """The smallest step between a gene's values, if all are multiples of it; else 0. NaN for too few values."""
    if len(distinct) < UNIT_VALUES:
        return np.nan
    step = np.diff(distinct, prepend=0).min()
    ratios = distinct / step
    if ratios[-1] > LARGEST_RATIO:
        return 0.0
    return float(step) if (np.abs(ratios - np.rint(ratios)) <= WHOLE_WIDTH).all() else 0.0


def _share_of_one(largest: np.ndarray) -> float:
    """The share of genes whose maximum is the commonest one; 0 for fewer than UNIT_GENES genes."""
    if len(largest) < UNIT_GENES:
        return 0.0
    middle = np.median(largest)
    return float((np.abs(largest - middle) <= MAXIMUM_WIDTH * middle).mean())


def _reach_one_maximum(sample: Sample, largest: np.ndarray) -> bool:
    """Whether many genes have the largest value of all, each in one or two cells: it was made the maximum of each.

    Where a few genes have it in many cells, values were clipped; where each cell has it, cells were made alike.
    """
    most = largest.max()
    n_genes = int((largest >= most * (1 - MAXIMUM_WIDTH)).sum())
    in_cells = [int((values >= most * (1 - MAXIMUM_WIDTH)).sum()) for values in sample.values]
    # of the genes that were looked at; `in_cells` counts all genes
    share = n_genes / len(largest)
    return (
        n_genes >= FEW_AT_MAXIMUM and share >= AT_MAXIMUM and sum(in_cells) <= 2 * share * (sample.moments[0] > 0).sum()
    )


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation; 0 when one side is constant."""
    ranks = [_ranks(values) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(rank.std() > 0 for rank in ranks) else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
