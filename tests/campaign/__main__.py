"""Run the campaign: python -m tests.campaign --minutes 60 [--only kills,fuzz] [--seed N] [--case NUMBER]"""

import argparse
import importlib
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.campaign.cases import FAILED, Tally, run_kind, table

SHARES = {"kills": 0.4, "disks": 0.2, "networks": 0.1, "fuzz": 0.15, "rewards": 0.05, "soak": 0.1}
"""Kind -> its share of the time."""


def main() -> int:
    """Play all kinds; exit code 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all kinds together")
    parser.add_argument("--only", default=",".join(SHARES), help="kinds, with commas between them")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: a new one")
    parser.add_argument("--case", type=int, help="play only this case of one kind")
    given = parser.parse_args()
    kinds = given.only.split(",")
    if unknown := [kind for kind in kinds if kind not in SHARES]:
        parser.error(f"--only {unknown[0]}: choose among {', '.join(SHARES)}")
    again = f"python -m tests.campaign --only {given.only} --seed {given.seed} --minutes {given.minutes:g}"
    print(f"seed {given.seed}; the same cases again: {again}", flush=True)
    # one core, so one thread a process: sums over other numbers of threads round otherwise, and bytes are compared
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    folder, tallies = Path(tempfile.mkdtemp(prefix="campaign-")), list[Tally]()
    whole = sum(SHARES[kind] for kind in kinds)
    try:
        for kind in kinds:
            (folder / kind).mkdir()
            seconds = 60 * given.minutes * SHARES[kind] / whole
            module = importlib.import_module(f"tests.campaign.{kind}")
            tallies.append(run_kind(module, given.seed, seconds, folder / kind, given.case))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\nseed {given.seed}\n{table(tallies)}", flush=True)
    failed = sum(sum(tally.failed.values()) for tally in tallies)
    if failed:
        print(f"{failed} cases failed; they are in {FAILED}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
