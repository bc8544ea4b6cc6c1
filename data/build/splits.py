"""How donors, cells or puzzles are divided over train and test."""

import random

from data.errors import UserError
from data.puzzles import Puzzle

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


def hold_out_donors(puzzles: list[Puzzle], fraction: float, seed: int) -> tuple[list[Puzzle], list[Puzzle]]:
    """(puzzles to train on, puzzles of held-out donors), in file order. Every tissue gives its share of donors.

    Raises UserError when a puzzle states no donor, or when there are fewer than two donors.
    """
    unknown = [puzzle.id for puzzle in puzzles if puzzle.meta.get("donor") is None]
    if unknown:
        raise UserError(f"puzzle {unknown[0]} states no donor, so nothing can be held out by donor; build with donors")
    tissues = {str(puzzle.meta["donor"]): str(puzzle.meta.get("tissue", "")) for puzzle in puzzles}
    if len(tissues) < 2:
        raise UserError(f"all puzzles are of donor {next(iter(tissues))}; holding one out needs a second")
    chosen = choose_test_donors(tissues, fraction, random.Random(f"hold out {seed}"))
    parts: tuple[list[Puzzle], list[Puzzle]] = ([], [])
    for puzzle in puzzles:
        parts[str(puzzle.meta["donor"]) in chosen].append(puzzle)
    return parts


def split_items(items: list, fraction: float, rng: random.Random) -> tuple[list, list]:
    """(train, test), in the given order. Of two or more items, each part gets at least one (test: if fraction > 0)."""
    n_test = max(0, min(max(round(fraction * len(items)), fraction > 0), len(items) - 1))
    test = set(rng.sample(range(len(items)), n_test))
    return [x for i, x in enumerate(items) if i not in test], [x for i, x in enumerate(items) if i in test]
