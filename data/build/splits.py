"""How donors, cells or puzzles are divided over train and test."""

import random

SPLITS = ("train", "test", "unseen")


def choose_test_donors(tissue_of: dict[str, str], fraction: float, rng: random.Random) -> set[str]:
    """Choose a fraction of the donors for test, at least one and never all, from every tissue in proportion.

    tissue_of: {donor: tissue}. Donors are taken one by one, each from the tissue that is farthest below its share. The
    last donor of a tissue is taken only when all tissues have a single donor left.
    """
    queues: dict[str, list[str]] = {}
    for donor, tissue in sorted(tissue_of.items()):  # sorted: the seed alone decides, not the order of the files
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


def split_items(items: list, fraction: float, rng: random.Random) -> tuple[list, list]:
    """(train, test), in the given order. Of two or more items, each part gets at least one (test: if fraction > 0)."""
    n_test = max(0, min(max(round(fraction * len(items)), fraction > 0), len(items) - 1))
    test = set(rng.sample(range(len(items)), n_test))
    return [x for i, x in enumerate(items) if i not in test], [x for i, x in enumerate(items) if i in test]
