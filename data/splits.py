"""Train, test and unseen: how donors and cells are divided, and what the splits promise each other."""

import random
from collections import Counter

from data.puzzles import Puzzle


def choose_test_donors(tissue_of: dict[str, str], fraction: float, rng: random.Random) -> set[str]:
    """A share of the donors (at least one, never all), spread over tissues in proportion.

    One by one from the tissue that lags most behind its share; the last donor of a tissue goes only when it must.
    """
    queues: dict[str, list[str]] = {}
    for donor, tissue in sorted(tissue_of.items()):
        queues.setdefault(tissue, []).append(donor)
    tissues = sorted(queues)
    rng.shuffle(tissues)
    for tissue in tissues:
        rng.shuffle(queues[tissue])
    share = {tissue: fraction * len(queues[tissue]) for tissue in tissues}
    test: set[str] = set()
    for _ in range(min(max(1, round(fraction * len(tissue_of))), len(tissue_of) - 1)):
        open_tissues = [t for t in tissues if len(queues[t]) > 1] or [t for t in tissues if queues[t]]
        tissue = max(open_tissues, key=lambda t: share[t])
        share[tissue] -= 1
        test.add(queues[tissue].pop())
    return test


def divide(items: list, fraction: float, rng: random.Random) -> tuple[list, list]:
    """(train, test), each in the given order; of two items or more, at least one in each (test: if fraction > 0)."""
    n_test = max(0, min(max(round(fraction * len(items)), fraction > 0), len(items) - 1))
    test = set(rng.sample(range(len(items)), n_test))
    return [x for i, x in enumerate(items) if i not in test], [x for i, x in enumerate(items) if i in test]


def audit(splits: dict[str, list[Puzzle]], split_mode: str) -> None:
    """Assert what the splits promise: no batch twice, no cell in two (but for instance), no donor in two (donor)."""
    batches = Counter((p.meta["source"], frozenset(p.meta["cell_ids"])) for ps in splits.values() for p in ps)
    assert all(count == 1 for count in batches.values()), "a batch of cells was drawn twice"
    cells = {s: {(p.meta["source"], cell) for p in ps for cell in p.meta["cell_ids"]} for s, ps in splits.items()}
    donors = {split: {puzzle.meta["donor"] for puzzle in puzzles} for split, puzzles in splits.items()}
    for one, other in (("train", "test"), ("train", "unseen"), ("test", "unseen")):
        if split_mode == "donor" or other == "unseen":
            assert not donors[one] & donors[other], f"donors in {one} and {other}: {donors[one] & donors[other]}"
        if split_mode != "instance" or other == "unseen":
            assert not cells[one] & cells[other], f"cells in {one} and {other}: {cells[one] & cells[other]}"
