"""The kind of a layer's values, judged from a sample of cells: counts, fractional counts, log counts or normalised."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data.build.matrix import (
    LARGEST_LOG,
    SAMPLE_RUN,
    SAMPLE_RUNS,
    Block,
    Matrix,
    _looks_scaled,
    _unscaled,
    check_values,
    row_blocks,
)
from data.errors import UserError

SAME_SUM = 0.01
"""Cells whose sums have at most this relative standard deviation were scaled to one sum."""
WHOLE_WIDTH, WHOLE_SHARE, MOST_CELLS = 0.02, 0.95, 0.5
"""A cell's values are multiples of one unit when this share of the ratios lies within this width of a whole number; a
layer holds multiples when this share of the cells does."""
FEWEST_VALUES = 5
"""Distinct values that a cell needs to be judged."""
WHOLE_VALUES = 0.3
"""Fractional counts of ambiguous reads are whole for at least this share of the values."""
COMMON_GENES, FEWEST_CELLS, COUNT_DISPERSION = 20, 10, 0.4
"""Counts vary as their mean does, logarithms and roots far less: the median of variance / mean of the values > 0, over
the genes that most cells express, is above COUNT_DISPERSION for counts. A gene needs FEWEST_CELLS cells."""
_UNLOGGED: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    np.expm1,
    lambda values: np.exp2(values) - 1,
    lambda values: np.power(10.0, values) - 1,
)


def gene_blocks(matrix: Matrix, rows: Sequence[int], is_gene: np.ndarray | None) -> Iterator[Block]:
    """Rows of a layer in blocks (row_blocks), with the entries of genes only. is_gene: [G] bool, None for all."""
    for block in row_blocks(matrix, rows):
        yield block if is_gene is None else _of_genes(block, is_gene)


def _of_genes(block: Block, is_gene: np.ndarray) -> Block:
    """A block without the entries of columns that are no genes."""
    kept = is_gene[block.columns]
    before = np.r_[0, np.cumsum(kept)]  # entries kept before each entry: where the rows begin and end now
    return Block(block.rows, before[block.starts], before[block.stops], block.columns[kept], block.values[kept])


def value_kind(matrix: Matrix, rows: np.ndarray, allow_scaled: bool = False, is_gene: np.ndarray | None = None) -> str:
    """The kind of the values of a layer's genes, judged from a sample of `rows`.

    "counts": whole numbers. "fractional counts": counts that were corrected for ambient RNA or divided over genes.
    "log counts": none larger than LARGEST_LOG. "normalised": all others. Raises UserError for values that cannot be
    ranked by expression: see check_values and _looks_scaled.
    """
    # spread over the file: an atlas of several studies may mix kinds of values, and neighbours are cheap to read
    runs = np.array_split(rows, min(SAMPLE_RUNS, len(rows)))
    sample = np.concatenate([run[:SAMPLE_RUN] for run in runs])
    cells, moments = [], np.zeros((3, matrix.n_genes))
    for block in gene_blocks(matrix, sample, is_gene):
        check_values(matrix, block, allow_scaled)
        for i in range(len(block.rows)):
            columns, values = block.row(i)
            cells.append(values)
            moments[:, columns] += [np.ones(len(values)), values, values**2]
    if all((values == np.rint(values)).all() for values in cells):
        return "counts"
    distinct = [len(np.unique(values)) / max(1, len(values)) for values in cells]
    if not allow_scaled and _looks_scaled(distinct, moments):
        raise UserError(
            f"{matrix} looks scaled (its genes have the variance 1 and no cell has a value twice) and gives no order "
            f"of expression; {_unscaled(matrix)}"
        )
    cells = [values for values in cells if len(values)]
    if _are_fractional(cells, moments):
        return "fractional counts"
    return "log counts" if max(values.max() for values in cells) <= LARGEST_LOG else "normalised"


def _are_fractional(cells: list[np.ndarray], moments: np.ndarray) -> bool:
    """Whether values that are not whole are counts all the same.

    cells: the values > 0 of each cell of the sample. moments: [3, G] number, sum and sum of squares of each gene's.
    Values that were made from counts show it: within a cell they are multiples of one unit (the value of one count),
    or all cells have one sum. When this holds for the exponentials, the values are logarithms. Values that are neither,
    as after a correction for ambient RNA (CellBender, SoupX, DecontX), are counts, unless they may be logarithms.
    """
    small = max(values.max() for values in cells) <= LARGEST_LOG
    if small and any(_same_sum(unlogged) or _units(unlogged) is not None for unlogged in _all_unlogged(cells)):
        return False
    if _same_sum(cells):
        return False
    units = _units(cells)
    if units is not None:  # counts that were divided by the depth of their cell have another unit in each cell
        return bool(np.std(np.log(units)) < SAME_SUM)
    whole = np.mean(np.concatenate([values == np.rint(values) for values in cells]))
    return bool(not small or whole >= WHOLE_VALUES or _dispersion(moments) > COUNT_DISPERSION)


def _dispersion(moments: np.ndarray) -> float:
    """The median of variance / mean of the values > 0, over the COMMON_GENES genes that most cells express."""
    common = np.argsort(-moments[0], kind="stable")[:COMMON_GENES]
    number, total, squares = moments[:, common[moments[0, common] >= FEWEST_CELLS]]
    if not len(number):
        return 0.0
    mean = total / number
    return float(np.median((squares - number * mean**2) / (number - 1) / mean))


def _all_unlogged(cells: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The values before each logarithm that is in use: natural, to the base 2 and to the base 10, of 1 + x."""
    for unlogged in _UNLOGGED:
        yield [unlogged(values) for values in cells]


def _same_sum(cells: list[np.ndarray]) -> bool:
    """Whether all cells have the same sum."""
    sums = np.array([values.sum() for values in cells])
    return len(cells) > 1 and bool(sums.std() <= SAME_SUM * sums.mean())


def _units(cells: list[np.ndarray]) -> np.ndarray | None:
    """The unit of each cell whose values are multiples of their smallest one. None when fewer than half of them are."""
    units, judged = [], 0
    for values in cells:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # damaged files hold values next to 0
            ratios = values / values.min()
        ratios = ratios[ratios < 1 / WHOLE_WIDTH**2]  # larger ones have no digits left behind the point
        if len(np.unique(np.rint(ratios))) < FEWEST_VALUES:
            continue
        judged += 1
        if np.mean(np.abs(ratios - np.rint(ratios)) <= WHOLE_WIDTH) >= WHOLE_SHARE:
            units.append(float(values.min()))
    return np.array(units) if judged and len(units) >= MOST_CELLS * judged else None
