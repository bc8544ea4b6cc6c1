"""Disks that are full, limited or read-only, folders that vanish, files that are cut or have a flipped bit.

Whatever happens, a command ends with one sentence or well, and what it calls good is what the unbroken run has.
"""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from data.puzzles import read_puzzles
from tests.campaign.cases import Skipped, until
from tests.campaign.jobs import Bench, make_bench
from tests.campaign.running import HANGS, Running, leaves_nothing, refused_in_one_sentence

JOBS = ("grpo 1 rank", "sft", "build", "ppo", "distill, embedded", "distill, endpoint", "evaluate", "annotate")
DAMAGED = (
    "checkpoint",
    "config.json",
    "metrics.jsonl",
    "bundle",
    "puzzles",
    "h5ad",
    "raw responses",
    "answers",
    "staged file",
)
CASES = (
    *(f"full: {name}" for name in JOBS),
    *(f"damage: {what}" for what in DAMAGED),
    *(f"read-only: {name}" for name in JOBS),
    *(f"largest file: {name}" for name in JOBS),
    *(f"removed: {name}" for name in JOBS),
)


def prepare(folder: Path) -> Bench:
    return make_bench(folder)


def close(bench: Bench) -> None:
    bench.close()


def play(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    kind, _, what = name.partition(": ")
    if kind == "damage":
        return damage(bench, what, rng, folder)
    return {"full": full, "read-only": read_only, "largest file": largest_file, "removed": removed}[kind](
        bench, what, rng, folder
    )


# ---- disks


class Disk:
    """A tmpfs of some KiB, mounted for a block."""

    def __init__(self, place: Path, kib: int) -> None:
        self.place, self.kib = place, kib

    def __enter__(self) -> "Disk":
        self.place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={self.kib}k", "tmpfs", str(self.place)]
        if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
            raise Skipped("mounting a small disk needs root")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=False)

    def remount(self, option: str) -> bool:
        words = ["mount", "-o", f"remount,{option}", str(self.place)]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0


def full(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    """The disk has room for a random part of what the job writes; then it is made larger and the job goes on."""
    whole, job = bench.whole(name), bench.jobs[name]
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 1024
    with Disk(folder / "disk", max(4, int(rng.uniform(0, 1.2) * size))) as disk:
        place = disk.place / "job"
        try:
            place.mkdir()
        except OSError:
            return "no room for a folder"
        running = Running(job.verb, *job.words(place), log=folder / "first.log")
        code = running.end()
        if code:
            refused_in_one_sentence(running, code, lambda said: "No space left on device" in said)
            assert not [path for path in disk.place.rglob("*partial*") if "predictions" not in path.name], "left over"
        disk.remount("size=200m")
        if code:
            running = Running(job.verb, *job.words(place), *again(job, place, code), log=folder / "second.log")
            assert running.end() == 0, running.output[-3000:]
        job.same(place, whole)
    return "was full" if code else "had room"


def again(job, place: Path, code: int) -> tuple:
    """--resume, where the first call left something to go on with."""
    return ("--resume",) if code and (place / job.began).exists() else ()


def read_only(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    """A folder on a disk that turns read-only while the job runs (or is so from the start), then can be written again."""
    whole, job = bench.whole(name), bench.jobs[name]
    with Disk(folder / "disk", 200 << 10) as disk:
        place = disk.place / "job"
        place.mkdir()
        when = rng.choice((0.0, rng.uniform(0, bench.seconds[name])))
        if not when and not disk.remount("ro"):
            raise Skipped("a disk cannot be made read-only here")
        running = Running(job.verb, *job.words(place), log=folder / "first.log")
        if when:
            running.wait_at_most(when)
            # a disk on which files are open for writing cannot be remounted: what a failing disk does by itself
            if not disk.remount("ro"):
                running.clear()
                running.end()
                return "busy, not made read-only"
        code = running.end()
        if code:
            refused_in_one_sentence(running, code, lambda said: "Read-only file system" in said)
        assert code or when
        disk.remount("rw")
        if code:
            running = Running(job.verb, *job.words(place), *again(job, place, code), log=folder / "second.log")
            assert running.end() == 0, running.output[-3000:]
        job.same(place, whole)
    return "read-only from the start" if not when else "read-only later"


def largest_file(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    """No file may be larger than a random size, as with `ulimit -f` or a quota."""
    whole, job, place = bench.whole(name), bench.jobs[name], folder / "job"
    place.mkdir()
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    running = Running(job.verb, *job.words(place), log=folder / "first.log", largest=rng.randrange(1, largest))
    code = running.end()
    if code:
        refused_in_one_sentence(running, code, lambda said: "File too large" in said)
    if code:
        running = Running(job.verb, *job.words(place), *again(job, place, code), log=folder / "second.log")
        assert running.end() == 0, running.output[-3000:]
    job.same(place, whole)
    return "too large" if code else "all fitted"


def removed(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    """Somebody removes the folder of a job that runs. It ends with a sentence, and no half of a run is left."""
    whole, job, place = bench.whole(name), bench.jobs[name], folder / "job"
    place.mkdir()
    running = Running(job.verb, *job.words(place), log=folder / "first.log")
    running.wait_at_most(rng.uniform(0.3, 1) * bench.seconds[name])
    if not running.alive():
        return "had ended"
    everything = running.all_processes()
    shutil.rmtree(place, ignore_errors=True)
    code = running.end()
    if code:
        refused_in_one_sentence(running, code)
        leaves_nothing(everything, running.log)
    left = place if place.is_dir() else None
    if left and code == 0:
        job.same(place, whole)
    if left and code:
        kept = [path for path in place.rglob("*") if path.is_file()]
        assert not kept, f"made again after it was removed: {kept[:5]}"
    return "said so" if code else "ended before it noticed"


# ---- damage


def damage(bench: Bench, what: str, rng: random.Random, folder: Path) -> str:
    return {
        "checkpoint": damaged_checkpoint,
        "config.json": damaged_record,
        "metrics.jsonl": damaged_metrics,
        "bundle": damaged_bundle,
        "puzzles": damaged_puzzles,
        "h5ad": damaged_h5ad,
        "raw responses": damaged_raw,
        "answers": damaged_answers,
        "staged file": damaged_staged,
    }[what](bench, rng, folder)


def spoil(path: Path, rng: random.Random) -> str:
    """Cut a file, flip a bit of it, fill a block with zeros, or empty it. Returns what was done."""
    data = bytearray(path.read_bytes())
    how = rng.choice(("cut", "bit", "zeros", "empty", "gone"))
    if how == "gone":
        path.unlink()
        return how
    if how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        place = rng.randrange(len(data))
        old = bytes(data[place : place + 512])
        data[place : place + 512] = bytes(len(old))
    else:
        data = bytearray()
    path.write_bytes(data)
    return how


def copied(bench: Bench, name: str, folder: Path) -> Path:
    """A copy of the unbroken run of a job, under a name of its own."""
    shutil.copytree(bench.whole(name), folder / "job")
    return folder / "job"


def damaged_checkpoint(bench: Bench, rng: random.Random, folder: Path) -> str:
    """The newest checkpoint, and sometimes the one before, has a damaged file: an older one is used, which is said."""
    name = rng.choice(("grpo 1 rank", "sft", "ppo"))
    whole, job, place = bench.whole(name), bench.jobs[name], copied(bench, name, folder)
    there = sorted((place / "run/checkpoints").iterdir())
    n_bad = rng.choice((1, 1, 2))
    done = []
    for checkpoint in there[-n_bad:]:
        file = rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
        before = file.read_bytes()
        done.append(f"{file.name} {spoil(file, rng)}")
        if file.is_file() and file.read_bytes() == before:
            return "the same bytes"
    shutil.rmtree(place / "run/model", ignore_errors=True)
    running = Running(job.verb, *job.words(place), "--resume", log=folder / "resume.log")
    code = running.end()
    assert code == 0, f"{done}: {running.output[-3000:]}"
    # without its state.json a folder is no checkpoint at all, as after a kill
    hidden = any(text == "state.json gone" for text in done)
    assert hidden or "--resume goes on from step-" in running.output, f"{done}: nothing said: {running.output[-1500:]}"
    for path in (place / "run/checkpoints").glob("*.damaged"):
        shutil.rmtree(path)
    job.same(place, whole)
    return f"checkpoint of {name}"


def damaged_record(bench: Bench, rng: random.Random, folder: Path) -> str:
    whole, job, place = bench.whole("grpo 1 rank"), bench.jobs["grpo 1 rank"], copied(bench, "grpo 1 rank", folder)
    record = place / "run/config.json"
    before = json.loads(record.read_text())
    how = spoil(record, rng)
    running = Running(job.verb, *job.words(place), "--resume", log=folder / "resume.log")
    code = running.end()
    try:
        same = record.is_file() and json.loads(record.read_text()).get("settings") == before["settings"]
    except (ValueError, AttributeError):
        same = False
    if code:
        refused_in_one_sentence(running, code, lambda said: str(place / "run") in said)
    else:
        assert same, f"{how}: another record was accepted"
        job.same(place, whole)
    return how


def damaged_metrics(bench: Bench, rng: random.Random, folder: Path) -> str:
    """A stream is damaged: refused by name and line, or its last line left out, or a note says which steps it lacks."""
    whole, job, place = bench.whole("grpo 1 rank"), bench.jobs["grpo 1 rank"], copied(bench, "grpo 1 rank", folder)
    name = rng.choice(("metrics.jsonl", "rollouts.jsonl", "timing.jsonl"))
    how = spoil(place / "run" / name, rng)
    running = Running(job.verb, *job.words(place), "--resume", log=folder / "resume.log")
    code = running.end()
    if code:
        refused_in_one_sentence(running, code, lambda said: str(place / "run" / name) in said)
        return f"{how}, refused"
    for last in ("checkpoints/step-000008/adapter_model.safetensors",):
        assert (place / "run" / last).read_bytes() == (whole / "run" / last).read_bytes()
    return f"{how}, went on"


def keep_a_bundle(bench: Bench) -> Path:
    """The bundle of a second step, made once."""
    job, kept = bench.jobs["grpo 1 rank"], bench.folder / "bundle"
    if not kept.is_dir():
        more = ("--save-steps", "every:2", "--steps", 2)
        running = Running(job.verb, *job.words(bench.folder / "bundles"), *more, log=bench.folder / "bundles.log")
        assert running.end() == 0, running.output[-2000:]
        shutil.copytree(bench.folder / "bundles/run/steps/step-000002", kept)
    return kept


def damaged_bundle(bench: Bench, rng: random.Random, folder: Path) -> str:
    """A bundle of a step with a damaged file is refused by name; with an unchanged meaning it replays equal."""
    kept = keep_a_bundle(bench)
    shutil.copytree(kept, folder / "step-000002")
    file = folder / "step-000002" / rng.choice(("bundle.json", "tensors.safetensors"))
    how = spoil(file, rng)
    running = Running("replay", folder / "step-000002", log=folder / "replay.log")
    code = running.end()
    if code:
        refused_in_one_sentence(running, code, lambda said: str(folder / "step-000002") in said)
    elif file.name == "tensors.safetensors":
        raise AssertionError(f"{how}: read as good")
    return f"{file.name} {how}{'' if code else ', read'}"


def damaged_puzzles(bench: Bench, rng: random.Random, folder: Path) -> str:
    """A damaged file of puzzles is refused by name, by commands that read it first; by a run that has begun, always."""
    job = bench.jobs["grpo 1 rank"]
    ending = rng.choice(("parquet", "jsonl"))
    source = bench.folder / "pipeline/puzzles/train.parquet"
    file = folder / f"train.{ending}"
    shutil.copyfile(source, file)
    if ending == "jsonl":
        file.write_text("".join(json.dumps(puzzle.to_row()) + "\n" for puzzle in read_puzzles(source)))
    before = file.read_bytes()
    how = spoil(file, rng)
    if file.is_file() and file.read_bytes() == before:
        return "the same bytes"
    running = Running("describe", "--puzzles", file, "--out", folder / "card", log=folder / "describe.log")
    code = running.end()
    if code:
        refused_in_one_sentence(running, code, lambda said: file.name in said)
    elif ending == "parquet":
        assert read_puzzles(file) == read_puzzles(source), f"{how}: another puzzle was read"
    if ending == "parquet" and how != "gone":
        place = copied(bench, "grpo 1 rank", folder)
        words = [file if word == source else word for word in job.words(place)]
        record = json.loads((place / "run/config.json").read_text().replace(str(source), str(file)))
        del record["checksum"]
        (place / "run/config.json").write_text(json.dumps(record))
        running = Running(job.verb, *words, "--resume", log=folder / "resume.log")
        refused_in_one_sentence(running, running.end(), lambda said: file.name in said)
    return f"{ending} {how}, {'refused' if code else 'readable'}"


def damaged_h5ad(bench: Bench, rng: random.Random, folder: Path) -> str:
    """A damaged .h5ad file: one sentence with its name; of what a last line with a checksum does not cover, none."""
    file = folder / "atlas.h5ad"
    shutil.copyfile(bench.folder / "pipeline/atlas.h5ad", file)
    how = spoil(file, rng)
    from tests.helpers.pipeline import BUILD

    running = Running("build", file, *BUILD, "--out", folder / "puzzles", log=folder / "build.log")
    code = running.end(HANGS)
    if code:
        refused_in_one_sentence(running, code)
        assert not (folder / "puzzles").exists(), "half a build"
    for right in [] if code else sorted((bench.folder / "pipeline/puzzles").glob("*.parquet")):
        assert (folder / "puzzles" / right.name).read_bytes() == right.read_bytes(), f"{how}: another cell was read"
    return f"{how}, {'refused' if code else 'readable'}"


def damaged_lines(
    bench: Bench, name: str, file: str, outcome: str, rng: random.Random, folder: Path, finished: Callable[[Path], None]
) -> str:
    """A file of answers is damaged: refused by name and line; or answers are asked again, and the end is the same."""
    whole, job, place = bench.whole(name), bench.jobs[name], copied(bench, name, folder)
    finished(place)
    how = spoil(place / file, rng)
    running = Running(job.verb, *job.words(place), "--resume", log=folder / "resume.log")
    code = running.end()
    if code:
        refused_in_one_sentence(running, code, lambda said: str(place / Path(file).parent) in said)
        return f"{how}, refused"
    assert (place / outcome).read_bytes() == (whole / outcome).read_bytes(), f"{how}: another answer was read"
    return f"{how}, went on"


def damaged_raw(bench: Bench, rng: random.Random, folder: Path) -> str:
    def finished(place: Path) -> None:
        (place / "t.jsonl").unlink()

    return damaged_lines(bench, "distill, embedded", "t.raw.jsonl", "t.jsonl", rng, folder, finished)


def damaged_answers(bench: Bench, rng: random.Random, folder: Path) -> str:
    def finished(place: Path) -> None:
        for path in place.glob("out.*"):
            if path.is_file():
                path.unlink()

    answers = "out.answers/predictions.partial.jsonl"
    return damaged_lines(bench, "annotate", answers, "out.csv", rng, folder, finished)


def damaged_staged(bench: Bench, rng: random.Random, folder: Path) -> str:
    """A finished file of a stopped build is damaged: it is built again, and the end is the same."""
    whole, job, place = bench.whole("build"), bench.jobs["build"], folder / "job"
    place.mkdir()
    running = Running(job.verb, *job.words(place), log=folder / "first.log")
    staged = place / ".puzzles.building"
    try:
        until(lambda: list(staged.glob("*.jsonl")) or not running.alive(), HANGS, "a finished file")
    finally:
        running.clear()
    running.end()
    files = sorted(staged.glob("*.jsonl"))
    how = "none was left"
    if files:
        how = spoil(files[0], rng)
        running = Running(job.verb, *job.words(place), "--resume", log=folder / "resume.log")
        assert running.end() == 0, running.output[-3000:]
        job.same(place, whole)
    return f"staged file {how}"
