"""The kind of a layer's values, judged from a sample of cells: counts, fractional counts, log counts or normalised.

The same rule decides what a build does with the values and what an inspection says about them.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data.build.matrix import Block, Matrix, other_layers, row_blocks
from data.errors import UserError
from data.meaning.scaled import Sample, why_no_order

SAMPLE_RUNS, SAMPLE_RUN = 8, 16
"""Rows that are read to tell counts from log counts: 8 runs of 16 neighbouring rows, evenly spaced."""
LARGEST_LOG = 25.0
"""Larger values are not logarithms of counts: exp(25) is 7e10."""
FEW_NEGATIVE = 0.05
"""Whole numbers of which at most this share is negative are counts with a fault; of scaled values about half are."""
SAME_SUM = 0.01
"""Cells whose sums have at most this relative standard deviation were scaled to one sum."""
WHOLE_WIDTH, WHOLE_SHARE, MOST_CELLS = 0.02, 0.95, 0.5
"""A cell's values are multiples of one unit when this share of the ratios lies within this width of a whole number; a
layer holds multiples when this share of the cells does."""
FEWEST_VALUES = 5
"""Distinct values that a cell needs to be judged."""
POOLED_VALUES = 200_000
"""At most this many values of the sample are looked at together, as if they were of one cell."""
WHOLE_VALUES = 0.3
"""Fractional counts of ambiguous reads are whole for at least this share of the values."""
COMMON_GENES, FEWEST_CELLS, COUNT_DISPERSION = 20, 10, 0.4
"""Counts vary as their mean does, logarithms and roots far less: the median of variance / mean of the values > 0, over
the genes that most cells express, is above COUNT_DISPERSION for counts. A gene needs FEWEST_CELLS cells."""


_INVERSES: tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("log counts", np.expm1),
    ("log counts", lambda values: np.exp2(values) - 1),
    ("log counts", lambda values: np.power(10.0, values) - 1),
    ("log counts", np.sinh),  # arcsinh of x, or of x / 5, is a logarithm for all but the smallest counts
    ("normalised", np.square),
)
"""(kind, the values before a transformation that is in use): logarithms of 1 + x, arcsinh and the square root."""


def gene_blocks(matrix: Matrix, rows: Sequence[int], is_gene: np.ndarray | None) -> Iterator[Block]:
    """Rows of a layer in blocks (row_blocks), with the entries of genes only. is_gene: [G] bool, None for all."""
    for block in row_blocks(matrix, rows):
        yield block if is_gene is None else _of_genes(block, is_gene)


def _of_genes(block: Block, is_gene: np.ndarray) -> Block:
    """A block without the entries of columns that are no genes."""
    kept = is_gene[block.columns]
    before = np.r_[0, np.cumsum(kept)]  # entries kept before each entry: where the rows begin and end now
    return Block(block.rows, before[block.starts], before[block.stops], block.columns[kept], block.values[kept])


def value_kind(
    matrix: Matrix, rows: np.ndarray, allow_scaled: bool | None = False, is_gene: np.ndarray | None = None
) -> str:
    """The kind of the values of a layer's genes, judged from a sample of `rows`.

    "counts": whole numbers. "fractional counts": counts that were corrected for ambient RNA or divided over genes.
    "log counts": logarithms. "normalised": all others, such as CPM or roots. Raises UserError for values that cannot be
    ranked by expression: see check_values and data/meaning/scaled.py. allow_scaled: as check_values takes it.
    """
    # spread over the file: an atlas of several studies may mix kinds of values, and neighbours are cheap to read
    runs = np.array_split(rows, min(SAMPLE_RUNS, len(rows)))
    sample = np.concatenate([run[:SAMPLE_RUN] for run in runs])
    cells, columns_of, moments = [], [], np.zeros((3, matrix.n_genes))
    for block in gene_blocks(matrix, sample, is_gene):
        check_values(matrix, block, allow_scaled)
        for i in range(len(block.rows)):
            columns, values = block.row(i)
            cells.append(values)
            columns_of.append(columns)
            moments[:, columns] += [np.ones(len(values)), values, values**2]
    if not allow_scaled and (why := why_no_order(Sample(columns_of, cells, moments))):
        raise UserError(f"{matrix} {why} and gives no order of expression; {_unscaled(matrix, allow_scaled)}")
    if all(_are_whole(values) for values in cells):
        return "counts"
    return _kind_of_cells([values for values in cells if len(values)], moments)


def kind_of_stored(values: np.ndarray) -> str:
    """The kind of some stored values > 0 of a matrix whose whole rows are too expensive to read.

    The sums and units of single cells are not known here, so large values that are not whole are called normalised.
    """
    if _are_whole(values):
        return "counts"
    kind = _kind_of_cells([values], np.zeros((3, 0)))
    told = _units([values]) is not None or np.mean(values == np.rint(values)) >= WHOLE_VALUES
    return "normalised" if kind == "fractional counts" and not told else kind


def _kind_of_cells(cells: list[np.ndarray], moments: np.ndarray) -> str:
    """The kind of values that are not all whole.

    cells: the values > 0 of each cell of the sample. moments: [3, G] number, sum and sum of squares of each gene's.
    Values that were made from counts show it: within a cell they are multiples of one unit (the value of one count),
    or all cells have one sum. When this holds for the values before a transformation, they were transformed. Values
    that are neither, as after a correction for ambient RNA (CellBender, SoupX, DecontX), are counts, unless they may be
    logarithms.
    """
    if _same_sum(cells):
        return "normalised"
    units = _units(cells)
    if units is not None:  # counts that were divided by the depth of their cell have another unit in each cell
        return "fractional counts" if np.std(np.log(units)) < SAME_SUM else "normalised"
    small = max(values.max() for values in cells) <= LARGEST_LOG
    for kind, inverse in _INVERSES:
        if (small or kind != "log counts") and _was_transformed(cells, inverse):
            return kind
    whole = np.mean(np.concatenate([values == np.rint(values) for values in cells]))
    fractional = not small or whole >= WHOLE_VALUES or _dispersion(moments) > COUNT_DISPERSION
    return "fractional counts" if fractional else "log counts"


def _was_transformed(cells: list[np.ndarray], inverse: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether the values before a transformation show that they were made from counts."""
    return _same_sum([inverse(values) for values in cells]) or _units(cells, inverse) is not None


def _are_whole(values: np.ndarray) -> bool:
    return bool((values == np.rint(values)).all())


def _dispersion(moments: np.ndarray) -> float:
    """The median of variance / mean of the values > 0, over the COMMON_GENES genes that most cells express."""
    common = np.argsort(-moments[0], kind="stable")[:COMMON_GENES]
    number, total, squares = moments[:, common[moments[0, common] >= FEWEST_CELLS]]
    if not len(number):
        return 0.0
    mean = total / number
    return float(np.median((squares - number * mean**2) / (number - 1) / mean))


def _same_sum(cells: list[np.ndarray]) -> bool:
    """Whether all cells have the same sum."""
    sums = np.array([values.sum() for values in cells])
    return len(cells) > 1 and bool(sums.std() <= SAME_SUM * sums.mean())


def _units(cells: list[np.ndarray], inverse: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray | None:
    """The unit of each cell whose values are multiples of their smallest one. None when fewer than half of them are.

    When the values of all cells together are multiples of one unit, that is the only unit: cells of a small panel have
    too few values each. inverse: judges the values before a transformation.
    """
    pool = _unit(np.concatenate(cells)[:POOLED_VALUES], inverse)
    if pool:
        return np.array([pool])
    judged = [unit for values in cells if (unit := _unit(values, inverse)) is not None]
    found = np.array([unit for unit in judged if unit])
    return found if judged and len(found) >= MOST_CELLS * len(judged) else None


def _unit(values: np.ndarray, inverse: Callable[[np.ndarray], np.ndarray] | None) -> float | None:
    """The unit of which a cell's values are multiples; 0.0 when they are not, None when there are too few to tell.

    Before a transformation, only values that are not whole tell something: 2**k - 1 and k * k are whole for each
    whole k, which is a count as it stands.
    """
    distinct = np.unique(values)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # damaged files hold values next to 0
        before = distinct if inverse is None else inverse(distinct)
        ratios = before / before[0]
    telling = ratios < 1 / WHOLE_WIDTH**2  # larger ones have no digits left behind the point
    if inverse is not None:
        telling &= distinct != np.rint(distinct)
    ratios = ratios[telling]
    if len(np.unique(np.rint(ratios))) < FEWEST_VALUES:
        return None
    return float(before[0]) if np.mean(np.abs(ratios - np.rint(ratios)) <= WHOLE_WIDTH) >= WHOLE_SHARE else 0.0


# ---- values that cannot be ranked


def check_values(matrix: Matrix, block: Block, allow_scaled: bool | None) -> None:
    """Raise UserError, with the layer's name, for a NaN, an infinity or a negative value in the rows of a block.

    allow_scaled: accept negative values. None: they are refused, and the command has no option to accept them.
    """
    stored = block.values  # one test for the whole block first: it nearly always passes
    if np.isfinite(stored).all() and (allow_scaled or not stored.size or stored.min() >= 0):
        return
    for start, stop in zip(block.starts, block.stops, strict=True):  # bad values of rows between do not matter
        values = block.values[start:stop]
        if not np.isfinite(values).all():
            raise UserError(f"{matrix} holds NaN or infinite values; {other_layers(matrix)}")
        if not allow_scaled and values.size and values.min() < 0 and are_negative_counts(stored):
            others = f", or {other_layers(matrix)}" if len(matrix.layers) > 1 else ""
            raise UserError(
                f"{matrix} holds negative counts, as CellBender 0.3.1 wrote them; run a later version of it{others}"
            )
        if not allow_scaled and values.size and values.min() < 0:
            raise UserError(
                f"{matrix} holds negative values, so it looks scaled and gives no order of expression; "
                f"{_unscaled(matrix, allow_scaled)}"
            )


def are_negative_counts(values: np.ndarray) -> bool:
    """Whether values are counts of which a few are negative. https://github.com/broadinstitute/CellBender/issues/306"""
    n_negative = int((values < 0).sum())
    return 0 < n_negative <= FEW_NEGATIVE * np.count_nonzero(values) and _are_whole(values)


def _unscaled(matrix: Matrix, allow_scaled: bool | None) -> str:
    """The remedies for scaled values, for a message."""
    others = other_layers(matrix, "unscaled values")
    return others if allow_scaled is None else f"{others}, or go on with --allow-scaled"
