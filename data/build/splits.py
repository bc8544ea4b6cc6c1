"""Train, test and unseen: how donors and cells are divided."""

import random

SPLITS = ("train", "test", "unseen")


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


def split_items(items: list, fraction: float, rng: random.Random) -> tuple[list, list]:
    """(train, test), each in the given order; of two items or more, at least one in each (test: if fraction > 0)."""
    n_test = max(0, min(max(round(fraction * len(items)), fraction > 0), len(items) - 1))
    test = set(rng.sample(range(len(items)), n_test))
    return [x for i, x in enumerate(items) if i not in test], [x for i, x in enumerate(items) if i in test]
