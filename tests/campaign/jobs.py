"""The jobs of the campaign: each command of the story, small, with what must be equal when it was cut short and went on."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import BaseServer

import anndata

from data.puzzles import Puzzle, read_puzzles
from eval.metrics import answer_of
from tests.campaign.running import Running, same_files
from tests.helpers.clusters import TYPES, MarkerServer, clustered
from tests.helpers.commands import SMALL_GRPO
from tests.helpers.endpoints import Server
from tests.helpers.pipeline import BUILD, make_pipeline

REWARD = """
import time

def fewer_letters(completion, puzzle):
    time.sleep(0.003)
    return -len(completion) / 50
"""
TRAINING = ("metrics.jsonl", "rollouts.jsonl", "checkpoints/*/adapter_model.safetensors")
TRAINING = (*TRAINING, "checkpoints/*/training/*")


@dataclass(frozen=True)
class Job:
    """A command that can go on where it was stopped."""

    verb: str
    words: Callable[[Path], tuple]
    """The options without --resume, given the folder in which it may write."""
    equal: tuple[str, ...]
    """Globs of the files that must have the bytes of the unbroken run, in that folder."""
    began: str
    """A file in the folder from which on --resume is the way to go on."""
    ranks: int = 1
    also: Callable[[Path], None] = lambda folder: None
    """Checks of what cannot be compared byte by byte."""

    def start(self, folder: Path, *more: object, **kwargs: object) -> Running:
        """Start it, or go on with it."""
        again = ("--resume",) if (folder / self.began).exists() else ()
        log = folder.with_name(f"{folder.name}.log")
        return Running(self.verb, *self.words(folder), *again, *more, log=log, ranks=self.ranks, **kwargs)

    def same(self, folder: Path, whole: Path) -> None:
        same_files(folder, whole, self.equal)
        self.also(folder)


@dataclass
class Bench:
    """What the jobs share: the pipeline, endpoints on loopback, and unbroken runs as they are needed."""

    folder: Path
    jobs: dict[str, Job]
    servers: list = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """{job: how long its unbroken run took}"""

    def whole(self, name: str) -> Path:
        """The folder of the unbroken run of a job."""
        place = self.folder / f"whole-{name.replace(' ', '-')}"
        if not place.is_dir():
            place.mkdir()
            running = self.jobs[name].start(place)
            if running.end():
                shutil.rmtree(place)
                raise AssertionError(f"the unbroken run: {running.output[-3000:]}")
            self.seconds[name] = time.monotonic() - running.began
            self.jobs[name].same(place, place)
        return place

    def close(self) -> None:
        for server in self.servers:
            server.close()


def make_bench(folder: Path) -> Bench:
    """Build the pipeline and name all jobs."""
    BaseServer.handle_error = lambda *_: None  # a client that was killed is no traceback of the endpoint's
    pipeline = folder / "pipeline"
    pipeline.mkdir()
    make_pipeline(pipeline)
    (pipeline / "rewards.py").write_text(REWARD)
    for number in (1, 2, 3):  # a build of several files has several workers and finished files
        shutil.copyfile(pipeline / "atlas.h5ad", pipeline / f"atlas{number}.h5ad")
    adata = clustered(list(TYPES), parts=2)
    adata.obs = adata.obs.rename(columns={"cell_type": "truth"})
    adata.write_h5ad(pipeline / "mine.h5ad")
    server, markers = an_endpoint(pipeline), MarkerServer()
    jobs = training_jobs(pipeline) | other_jobs(pipeline, server, markers)
    return Bench(folder, jobs, [server, markers])


def an_endpoint(pipeline: Path) -> Server:
    """A third of its answers is right. What a request gets depends on its seed alone, so asked again it gets the same."""

    def behave(number: int, of: Puzzle, asked: int) -> dict:
        labels = of.answer if server.bodies[-1]["seed"] % 3 == 0 else [*of.answer[1:], of.answer[0]]
        return {"content": answer_of(labels, f"Cell 1 has {of.cells[0][0]}.")}

    server = Server(read_puzzles(pipeline / "puzzles/test.parquet"), behave)
    return server


def training_jobs(pipeline: Path) -> dict[str, Job]:
    given = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet")
    given += ("--reward", f"{pipeline / 'rewards.py'}:fewer_letters", *SMALL_GRPO, "--engine", "torch")
    given += ("--reward-workers", 1, "--save-every", 3, "--steps", 8, "--date", "2026-11-27", "--keep-checkpoints", 9)
    given += ("--hang-seconds", 90)  # so soon the ranks name one that was killed before it had joined

    def grpo(*more: object) -> Callable[[Path], tuple]:
        return lambda folder: (*given, *more, "--out", folder / "run")

    def job(*more: object, verb: str = "grpo", ranks: int = 1) -> Job:
        return Job(verb, grpo(*more), tuple(f"run/{name}" for name in TRAINING), "run/config.json", ranks)

    split = ("--placement", "split", "--sampler-ranks", 1)
    sft = ("--traces", pipeline / "traces.jsonl", "--model", pipeline / "base", "--epochs", 2, "--batch-size", 16)
    sft += ("--lr", 3e-3, "--lora-rank", 4, "--lora-alpha", 8, "--save-every", 4, "--keep-checkpoints", 9)
    return {
        "grpo 1 rank": job(),
        "grpo 2 ranks": job(ranks=2),
        "grpo sharded": job("--shard", "fsdp", ranks=2),
        "grpo split": job(*split, ranks=2),
        "grpo split, staleness 1": job(*split, "--max-staleness", 1, "--correction", "tis", ranks=2),
        "ppo": job("--critic-lr", 1e-2, "--critic-warmup", 1, "--epochs", 2, "--minibatches", 2, verb="ppo"),
        "sft": Job(
            "sft",
            lambda folder: (*sft, "--out", folder / "run"),
            ("run/metrics.jsonl", *(f"run/{name}" for name in TRAINING[2:]), "run/model/*.safetensors"),
            "run/config.json",
        ),
    }


def other_jobs(pipeline: Path, server: Server, markers: MarkerServer) -> dict[str, Job]:
    files = tuple(pipeline / f"atlas{number}.h5ad" for number in (1, 2, 3))
    test = pipeline / "puzzles/test.parquet"
    asked = ("--temperature", 1, "--model", "m")

    def distilled(folder: Path) -> None:
        """No response is recorded twice, and what is recorded is what was served, but for what a kill lost."""
        rows = [json.loads(line) for line in (folder / "t.raw.jsonl").read_text().splitlines()]
        keys = [(row["puzzle_id"], row["attempt"], row["hinted"]) for row in rows if "text" in row]
        assert len(set(keys)) == len(keys), "a response was recorded twice"

    def annotated(folder: Path) -> None:
        labels = anndata.read_h5ad(folder / "out.h5ad").obs["cell_type_llm"].astype(str)
        assert (labels == anndata.read_h5ad(pipeline / "mine.h5ad").obs["truth"].astype(str)).all()
        rows = (folder / "out.answers/predictions.partial.jsonl").read_text().splitlines()[1:]
        names = [json.loads(row)["id"] for row in rows]
        assert len(set(names)) == len(names), "an answer was bought twice"

    return {
        "build": Job(
            "build",
            lambda folder: (*files, *BUILD, "--allow-leaks", "--workers", 2, "--out", folder / "puzzles"),
            ("puzzles/*",),
            ".puzzles.building",
        ),
        "distill, embedded": Job(
            "distill",
            lambda folder: ("--puzzles", pipeline / "puzzles/train.parquet", "--out", folder / "t.jsonl"),
            (
                "t.jsonl",
            ),  # a judge that was killed rejects a trace, and another one is drawn: the raw file may hold more
            "t.raw.jsonl",
        ),
        "distill, endpoint": Job(
            "distill",
            lambda folder: (
                *("--puzzles", test, "--out", folder / "t.jsonl", "--teacher", "openai", "--base-url", server.url),
                *(*asked, "--candidates", 4, "--concurrency", 4, "--backoff-seconds", 0.01),
            ),
            ("t.jsonl",),
            "t.raw.jsonl",
            also=distilled,
        ),
        "evaluate": Job(
            "evaluate",
            lambda folder: (
                *("--puzzles", test, "--out", folder / "eval", "--endpoint", server.url, *asked, "--concurrency", 1),
            ),
            ("eval/predictions.jsonl", "eval/metrics.json"),
            "eval/predictions.partial.jsonl",
        ),
        "annotate": Job(
            "annotate",
            lambda folder: (
                *(pipeline / "mine.h5ad", "--cluster-key", "leiden", "--out", folder / "out.h5ad", "--model", "m"),
                *("--endpoint", markers.url, "--candidates", ",".join(TYPES), "--max-cells", 3, "--concurrency", 2),
            ),
            ("out.csv",),
            "out.answers/predictions.partial.jsonl",
            also=annotated,
        ),
    }
