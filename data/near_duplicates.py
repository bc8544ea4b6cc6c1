"""Pairs of cells whose ranked gene lists are almost the same, found without comparing all pairs.

Two lists are near-duplicates when they share at least SAME_GENES percent of their genes (Jaccard index) and rank the
shared genes alike (Spearman correlation of at least SAME_ORDER percent). Both rules are decided in whole numbers, so
the result does not depend on rounding.
"""

from collections.abc import Iterator, Sequence

import numpy as np

MIN_GENES = 20
"""Shorter lists carry too little information to tell one cell from another: they are counted, but not judged."""
SAME_GENES = 90
"""Smallest Jaccard index of near-duplicates, in percent."""
SAME_ORDER = 95
"""Smallest Spearman correlation of near-duplicates over the genes that they share, in percent."""
_BITS = np.left_shift(np.uint64(1), np.arange(64, dtype=np.uint64))
"""One bit per gene, modulo 64. A list's sketch is the exclusive or of its genes' bits: two lists that differ in k genes have
sketches that differ in at most k bits, so many different bits rule a pair out without comparing its genes."""


def near_duplicates(
    genes: list[np.ndarray], firsts: Sequence[int], seconds: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(second, near-duplicates among the firsts, their Jaccard indices, their Spearman correlations), [k >= 1] each.

    genes: [list][rank] distinct genes per list, numbered from 0, rare genes first. firsts, seconds: indices of lists.
    The search is exact. Two lists that share at least t genes also share one of the len - t + 1 rarest genes of either
    list (prefix filtering), so only lists that meet in such a gene are compared, and only if their parity sketches
    allow it. Lists of fewer than MIN_GENES genes are left out, and so is the pair of a list with itself.
    """
    length = np.array([len(row) for row in genes], dtype=np.int64)
    firsts, seconds = (np.array([n for n in ns if length[n] >= MIN_GENES], dtype=np.int64) for ns in (firsts, seconds))
    if not len(firsts) or not len(seconds):
        return
    n_genes = 1 + max(int(genes[n].max()) for ns in (firsts, seconds) for n in ns)
    sketch = np.array([np.bitwise_xor.reduce(_BITS[row % len(_BITS)], initial=0) for row in genes], dtype=np.uint64)
    rank = np.full(n_genes + 1, -1, dtype=np.int32)  # the last entry stands for the padding
    for size in np.unique(length[seconds]).tolist():
        # lists whose lengths differ too much cannot reach the Jaccard index
        near = firsts[100 * np.minimum(length[firsts], size) >= SAME_GENES * np.maximum(length[firsts], size)]
        if not len(near):
            continue
        need = -(-SAME_GENES * (length[near] + size) // (100 + SAME_GENES))  # fewest shared genes for the Jaccard index
        padded = np.full((len(near), int(length[near].max())), n_genes, dtype=np.int32)
        padded[np.arange(padded.shape[1]) < length[near][:, None]] = np.concatenate([genes[n] for n in near])
        rows, starts = _rows_by_gene(padded, length[near] - need + 1, n_genes)
        may_differ, sketches = length[near] + size - 2 * need, sketch[near]
        for second in seconds[length[seconds] == size]:
            rarest = np.sort(genes[second])[: size - need.min() + 1]
            meet = np.concatenate([rows[starts[gene] : starts[gene + 1]] for gene in rarest])
            meet = np.unique(meet[np.bitwise_count(sketches[meet] ^ sketch[second]) <= may_differ[meet]])
            meet = meet[near[meet] != second]
            if len(meet):
                rank[genes[second]] = np.arange(size)
                found, jaccard, spearman = _alike(rank[padded[meet]], length[near[meet]], size)
                rank[genes[second]] = -1  # the table of ranks serves the next list too
                if len(found):
                    yield int(second), near[meet[found]], jaccard, spearman


def _rows_by_gene(padded: np.ndarray, n_rarest: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the padded table gene by gene, start of each gene's rows).

    A row stands under its n_rarest rarest genes.
    """
    rarest = np.sort(padded, axis=1)[:, : n_rarest.max()]
    rows, columns = np.nonzero(np.arange(rarest.shape[1]) < n_rarest[:, None])
    listed = rarest[rows, columns]
    order = np.argsort(listed, kind="stable")
    return rows[order], np.searchsorted(listed[order], np.arange(n_genes + 1))


def _alike(ranks: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows that are near-duplicates, their Jaccard indices, their Spearman correlations).

    ranks: [rows][rank in the first list] rank of that gene in the second list, -1 where the second list lacks the gene.
    """
    shared = (ranks >= 0).sum(1)
    union = lengths + size - shared
    same_genes = 100 * shared >= SAME_GENES * union
    rows, ranks = np.flatnonzero(same_genes), ranks[same_genes]
    shared, union = shared[same_genes].astype(np.int64), union[same_genes]
    common = ranks >= 0
    # ranks among the shared genes alone, in either list
    in_first = np.cumsum(common, axis=1) - 1
    in_second = np.argsort(np.argsort(np.where(common, ranks, np.iinfo(np.int32).max), axis=1), axis=1)
    squares = (np.where(common, in_first - in_second, 0) ** 2).sum(1)
    span = shared * (shared**2 - 1)  # Spearman's rho = 1 - 6 squares / span
    same_order = 600 * squares <= (100 - SAME_ORDER) * span
    rho = 1 - 6 * squares / np.maximum(1, span)
    return rows[same_order], (shared / union)[same_order], rho[same_order]
