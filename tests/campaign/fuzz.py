"""Readers of what others wrote get what nobody wrote: only the declared exceptions come out, and memory stays bounded.

A case is some hundred inputs of one reader, from hypothesis, in a process of its own whose memory is limited:

    python -m tests.campaign.fuzz READER SEED EXAMPLES FOLDER
"""

import copy
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from data.files import sealed_row
from tests.campaign.jobs import Bench, make_bench
from tests.helpers.commands import ROOT

EXAMPLES = {"checkpoint": 150, "h5ad": 60, "annotated h5ad": 60, "bundle": 150, "gguf": 40}
"""Inputs of a case, where not MOST."""
MOST = 400
MEMORY = 2 << 30
"""Bytes that the inputs may make the process take, beyond what it has after its imports."""
SECONDS = 900


@dataclass(frozen=True)
class Reader:
    """What is fed, with what, and what may come out."""

    inputs: Callable[[Path], st.SearchStrategy]
    """Made from the folder of valid files."""
    feed: Callable[[Any, Path], None]
    """(input, an empty folder); raises what the reader raises, but for what it declares."""


# ---- inputs

TEXT = st.text(max_size=200) | st.text(st.characters(), max_size=40)  # with halves of surrogate pairs
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(10**400) | st.just("9" * 500)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
DEEP = st.integers(1, 200_000).map(lambda n: "[" * n)


def pieces(*words: str) -> st.SearchStrategy[str]:
    """Texts of these words and others, in any order."""
    return st.lists(st.sampled_from(words) | TEXT, max_size=30).map("".join)


def paths_in(value: Any, place: tuple = ()) -> list[tuple]:
    """The places of a JSON value, the root left out."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(*place, key), *paths_in(inner, (*place, key))]
    return found


@st.composite
def changed_json(draw: Callable, value: Any) -> Any:
    """A valid value of which some places hold something else, or are gone."""
    made = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = paths_in(made)
        if not places:
            return draw(JSON)
        *way, last = draw(st.sampled_from(places))
        node = made
        for key in way:
            node = node[key]
        if draw(st.booleans()):
            node[last] = draw(JSON)
        else:
            del node[last]
    return made


@st.composite
def changed_bytes(draw: Callable, data: bytes) -> bytes:
    """A valid file of which bytes are flipped, cut, doubled, or replaced by extreme numbers."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        if not made:
            break
        # the head of a file holds its sizes and offsets: half of the changes are made there
        most = len(made) if draw(st.booleans()) else min(len(made), 4096)
        place = draw(st.integers(0, most - 1))
        how = draw(st.sampled_from(("flip", "number", "cut", "double", "random")))
        if how == "flip":
            made[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            number = draw(st.sampled_from((0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)))
            made[place : place + 8] = number.to_bytes(8, "little")
        elif how == "cut":
            del made[place : draw(st.integers(place, len(made)))]
        elif how == "double":
            made[place:place] = made[place : place + 64]
        else:
            made[place : place + 16] = draw(st.binary(max_size=16))
    return bytes(made)


# ---- readers


def feed_response(text: str, folder: Path) -> None:
    from reward.cellpuzzles import parse_response

    found = parse_response(text, 3)
    assert found.valid == (found.problem == "") == (len(found.labels) == 3)


def feed_row(row: Any, folder: Path) -> None:
    from data.errors import UserError
    from data.puzzles import Puzzle

    if not isinstance(row, dict):
        return  # read_rows gives objects only
    try:
        puzzle = Puzzle.from_row(row)
    except UserError:
        return
    assert Puzzle.from_row(puzzle.to_row()) == puzzle, "another puzzle after a round trip"


def feed_rows_file(content: bytes, folder: Path) -> None:
    from data.errors import UserError
    from data.puzzles import read_puzzles

    for ending in ("jsonl", "json", "parquet"):
        (folder / f"p.{ending}").write_bytes(content)
        try:
            read_puzzles(folder / f"p.{ending}")
        except UserError as error:
            assert "p." in str(error)


def feed_recipe(content: bytes, folder: Path) -> None:
    import click

    from data.errors import UserError
    from launch.build import BuildCommandConfig
    from launch.options import resolve
    from trainer.config import GrpoConfig

    (folder / "r.yaml").write_bytes(content)
    for kind in (GrpoConfig, BuildCommandConfig):
        try:
            resolve(kind, [folder / "r.yaml"], {})
        except (click.UsageError, UserError) as error:
            assert len(str(error)) < 20_000, "a message of that length is a memory bomb"


def feed_bundle(files: tuple[bytes, bytes], folder: Path) -> None:
    import zlib

    from data.errors import UserError
    from trainer.record.bundle import read_bundle

    content, tensors = files
    try:  # a right checksum, so that what lies behind it is reached
        value = json.loads(content)
        if isinstance(value, dict) and "crc32" in value:
            content = json.dumps(value | {"crc32": zlib.crc32(tensors)}).encode()
    except (ValueError, RecursionError):
        pass
    (folder / "bundle.json").write_bytes(content)
    (folder / "tensors.safetensors").write_bytes(tensors)
    try:
        read_bundle(folder)
    except UserError as error:
        assert str(folder) in str(error)


def feed_checkpoint(files: dict[str, bytes], folder: Path) -> None:
    import zlib

    from data.errors import UserError
    from data.files import sealed
    from trainer.record.runfolder import load_checkpoint

    place = folder / "step-000003"
    try:
        state = json.loads(files["state.json"])
        if isinstance(state, dict) and isinstance(state.get("crc32"), dict):
            state = {key: value for key, value in state.items() if key != "checksum"}
            state["crc32"] |= {name: zlib.crc32(data) for name, data in files.items() if name in state["crc32"]}
            files = files | {"state.json": json.dumps(sealed(state)).encode()}
    except (ValueError, RecursionError):
        pass
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    try:
        load_checkpoint(place)
    except UserError as error:
        assert "step-000003" in str(error)


def feed_manifest(value: Any, folder: Path) -> None:
    """What a sampler gets from the store: an order with a manifest."""
    import torch

    from rollout.sync import Parcel, SyncError

    parcel = Parcel.of({"a.lora_A": torch.ones(2, 3), "b.lora_B": torch.zeros(3)})
    try:
        parcel.verify([(row[0], tuple(row[1]), *row[2:]) for row in value])
    except SyncError:
        return
    except (TypeError, IndexError, KeyError, AttributeError):
        return  # only signed values reach it, so a row of another form is ours to fix, and named by its type


def feed_store(values: tuple[bytes, list[bytes]], folder: Path) -> None:
    """Unsigned values of the store, whatever they look like, are refused and never block."""
    import torch.distributed as dist

    from rollout.link import read_notice, take_signed

    store = dist.HashStore()
    head, parts = values
    store.set("k", head)
    for number, part in enumerate(parts):
        store.set(f"k/{number}", part)
    assert read_notice(store, "k", "token") is None
    assert take_signed(store, "k", "token") is None


def feed_reply(content: bytes, folder: Path) -> None:
    from data.distill.distill import Request
    from data.puzzles import Puzzle
    from rollout.teachers.replies import TryFailedError, read_completion, spellings_of

    puzzle = Puzzle(id="p", context="", cells=[["A"]], candidates=["a"], answer=["a"])
    secret = spellings_of("sk-secret-key")
    try:
        done = read_completion(content, Request(puzzle=puzzle, attempt=0), lambda text: secret.sub("KEY", text))
    except TryFailedError as error:
        assert len(str(error)) < 2000
        return
    assert all(isinstance(text, str) for text in (done.text, done.reasoning, done.finish_reason, done.model))
    json.dumps(done.text).encode()


def feed_candidates(content: bytes, folder: Path) -> None:
    from data.errors import UserError
    from eval.annotate.candidates import listed

    (folder / "c.txt").write_bytes(content)
    try:
        labels, terms, _ = listed(str(folder / "c.txt"))
    except UserError as error:
        assert "c.txt" in str(error)
        return
    assert len(labels) >= 2 and all(label.strip() == label != "" for label in labels)


def feed_labels(content: bytes, folder: Path) -> None:
    from data.clusters.known import read_labels
    from data.errors import UserError

    (folder / "labels.json").write_bytes(content)
    try:
        read_labels(folder / "labels.json")
    except UserError as error:
        assert "labels.json" in str(error)


def feed_h5ad(content: bytes, folder: Path) -> None:
    from data.build.build import build_puzzles
    from data.build.settings import BuildConfig
    from data.build.staging import Staging
    from data.errors import UserError
    from data.inspection.inspection import inspect_file

    file = folder / "a.h5ad"
    file.write_bytes(content)
    (folder / "staging").mkdir()
    config = BuildConfig(min_cells=3, max_cells=4, top_genes=10, puzzles_per_n=2, test_puzzles_per_n=1)
    for read in (
        lambda: inspect_file(file),
        lambda: build_puzzles([file], config, workers=1, staging=Staging(folder / "staging")),
    ):
        try:
            read()
        except UserError:
            continue


def feed_clusters(content: bytes, folder: Path) -> None:
    from data.clusters.profiles import read_profiles
    from data.errors import UserError

    (folder / "a.h5ad").write_bytes(content)
    try:
        read_profiles(folder / "a.h5ad", "leiden")
    except UserError:
        return


def feed_gguf(content: bytes, folder: Path) -> None:
    from data.errors import UserError
    from trainer.model.from_gguf import import_gguf

    (folder / "m.gguf").write_bytes(content)
    try:
        import_gguf(folder / "m.gguf", folder / "out")
    except UserError as error:
        assert "m.gguf" in str(error)
        assert not (folder / "out").exists()


def feed_raw(content: bytes, folder: Path) -> None:
    from data.distill.meter import Meter
    from data.distill.responses import RawFile
    from data.errors import UserError

    (folder / "t.raw.jsonl").write_bytes(content)
    try:
        with RawFile(folder / "t.raw.jsonl", {"a": 1}, Meter(), resume=True, replace=False, sync=False):
            pass
    except UserError as error:
        assert "t.raw.jsonl" in str(error)


def feed_predictions(content: bytes, folder: Path) -> None:
    from data.errors import UserError
    from eval.metrics import read_predictions
    from eval.predict import PARTIAL, Partial

    (folder / PARTIAL).write_bytes(content)
    (folder / "p.jsonl").write_bytes(content)
    for read in (lambda: Partial(folder, {"a": 1}, True), lambda: read_predictions(folder / "p.jsonl")):
        try:
            read()
        except UserError:
            continue


# ---- valid files to start from


def as_bytes(strategy: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    return strategy.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))


def json_bytes(valid: Any) -> st.SearchStrategy[bytes]:
    whole = json.dumps(valid).encode()
    deep = DEEP.map(str.encode)
    return as_bytes(changed_json(valid)) | changed_bytes(whole) | deep | st.binary(max_size=50) | as_bytes(JSON)


def lines_bytes(valid: list[Any]) -> st.SearchStrategy[bytes]:
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in valid)
    some = st.lists(st.sampled_from(valid).flatmap(changed_json) | st.sampled_from(valid), max_size=4)
    lines = some.map(lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return lines | changed_bytes(whole) | DEEP.map(str.encode)


def row_of(folder: Path) -> dict:
    from data.puzzles import read_rows

    return read_rows(folder / "pipeline/puzzles/test.parquet")[0]


def recipes(folder: Path) -> st.SearchStrategy[bytes]:
    names = [
        "lr",
        "steps",
        "model",
        "reward",
        "beta",
        "seed",
        "h5ad",
        "min-cells",
        "drop_genes",
        "preset",
        "group_size",
    ]
    odd = ["2024-99-99", "2024-01-01", ".inf", "-.nan", "1e400", "!!python/object/apply:os.system ['true']", "[[1]]"]
    odd += ["&a [*a]", "{a: 1}", "yes", "0x1f", "1_000", "!!binary aGk=", "null", "'x'", "!!set {a}", "?", "9" * 500]
    odd += ["\n - a\n - [b]", "&x !!str a", "!!timestamp x", "1:2:3"]
    lines = st.lists(st.tuples(st.sampled_from(names), st.sampled_from(odd) | TEXT), max_size=5)
    text = lines.map(lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs))
    bomb = st.integers(2, 40).map(
        lambda n: (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, n))
            + f"lr: *a{n - 1}"
        )
    )
    named = st.integers(2, 30).map(
        lambda n: "lr: [" * n + "&a0 [x, x]" + "]" * n + f"\nmodel: {'*a0 ' if n % 2 else '*b'}\n"
    )
    inner = st.integers(2, 40).map(
        lambda n: "h5ad: [&a0 [x, x]" + "".join(f", &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, n)) + "]\n"
    )
    return (
        text | pieces("lr", ": ", "\n", "- ", "[", "{", "&a ", "*a ", "'", "|", "\t") | bomb | named | inner | DEEP
    ).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60)


def replies(folder: Path) -> st.SearchStrategy[bytes]:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    message = {"role": "assistant", "content": [{"text": "a"}], "reasoning": "sk-secret-key"}
    valid = {"model": "m", "choices": [{"message": message, "finish_reason": "stop"}], "usage": usage, "error": {}}
    return json_bytes(valid)


def checkpoint_files(folder: Path) -> st.SearchStrategy[dict[str, bytes]]:
    place = folder / "whole-grpo-1-rank/run/checkpoints/step-000003"
    files = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    state = json.loads(files["state.json"])
    parts = {name: st.just(data) | changed_bytes(data) for name, data in files.items()}
    return st.fixed_dictionaries(parts | {"state.json": json_bytes(state) | st.just(files["state.json"])})


def bundle_files(folder: Path) -> st.SearchStrategy[tuple[bytes, bytes]]:
    place = folder / "bundle"
    content, tensors = (place / "bundle.json").read_bytes(), (place / "tensors.safetensors").read_bytes()
    return st.tuples(json_bytes(json.loads(content)) | st.just(content), st.just(tensors) | changed_bytes(tensors))


def gguf_bytes(folder: Path) -> st.SearchStrategy[bytes]:
    found = folder / "m.gguf"
    return changed_bytes(found.read_bytes()) | st.binary(max_size=100).map(lambda tail: b"GGUF" + tail)


def file_bytes(name: str) -> Callable[[Path], st.SearchStrategy[bytes]]:
    """A file of ours, and as others write it: without the checksum that refuses it before it is read."""

    def inputs(folder: Path) -> st.SearchStrategy[bytes]:
        path = folder / "pipeline" / name
        return changed_bytes(path.read_bytes()) | changed_bytes(without_checksum(path))

    return inputs


def without_checksum(path: Path) -> bytes:
    import pyarrow.parquet

    from data.formats.checksum import LENGTH

    if path.suffix == ".parquet":
        plain = BytesIO()
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).replace_schema_metadata(None), plain)
        return plain.getvalue()
    content = path.read_bytes()
    return content[:-LENGTH] if b"CRC-32" in content[-LENGTH:] else content


RAW = [
    {"settings": {"a": 1}},
    {"puzzle_id": "p", "attempt": 0, "hinted": False, "text": "t", "finish_reason": "stop", "prompt_tokens": 1},
    {"puzzle_id": "p", "attempt": 1, "hinted": False, "sent": 0.5},
    {"puzzle_id": "p", "attempt": 1, "hinted": False, "error": "e"},
    {"puzzle_id": "q", "attempt": 1, "hinted": True, "lost": 0.5, "error": "e"},
    sealed_row({"puzzle_id": "q", "attempt": 2, "hinted": False, "text": "t"}),
]
ANSWERED = [
    {"settings": {"a": 1}},
    {"id": "p", "prediction": "x", "response_tokens": 3, "finish_reason": "stop", "samples": ["a", "b"]},
]
LABELS = {
    "labels": {"T cell": {"ontology_term_id": "CL:0000084", "tissues": ["blood"], "n": 3}},
    "genes": ["A"],
    "puzzles": {"max_cells": 3, "top_genes": 10, "drop_genes": []},
}
MANIFEST = [["a.lora_A", [2, 3], "float32", 123], ["b.lora_B", [3], "float32", 5]]
TAGS = ("<think>", "</think>", "<answer>", "</answer>", " | ", "T cell", "\n", "<think>a</think><answer>a|b|c</answer>")
HEADS = ("Context: ", " \n\n", "Cell 1: A, B\n", "Match the cells above to one of the following cell types:\n", "a | b")
READERS = {
    "response": Reader(lambda folder: pieces(*TAGS), feed_response),
    "puzzle row": Reader(
        lambda folder: (
            changed_json(row_of(folder))
            | st.fixed_dictionaries({name: pieces(*HEADS) for name in ("system_msg", "user_msg", "assistant_msg")})
        ),
        feed_row,
    ),
    "recipe": Reader(recipes, feed_recipe),
    "endpoint's reply": Reader(replies, feed_reply),
    "candidates": Reader(
        lambda folder: pieces("T cell", "\t", "CL:0000084", "\n", "#", "\r", "\ufeff", "\x85").map(
            lambda text: text.encode("utf-8", "surrogatepass")
        ),
        feed_candidates,
    ),
    "file of puzzles": Reader(
        lambda folder: lines_bytes([row_of(folder)]) | file_bytes("puzzles/test.parquet")(folder), feed_rows_file
    ),
    "labels.json": Reader(lambda folder: json_bytes(LABELS), feed_labels),
    "manifest": Reader(lambda folder: changed_json(MANIFEST), feed_manifest),
    "store": Reader(
        lambda folder: st.tuples(
            st.binary(max_size=100) | st.from_regex(rb"\d{1,6} [0-9a-f]{64}", fullmatch=True), st.lists(st.binary())
        ),
        feed_store,
    ),
    "raw responses": Reader(lambda folder: lines_bytes(RAW), feed_raw),
    "answers": Reader(lambda folder: lines_bytes(ANSWERED), feed_predictions),
    "checkpoint": Reader(checkpoint_files, feed_checkpoint),
    "bundle": Reader(bundle_files, feed_bundle),
    "h5ad": Reader(file_bytes("atlas.h5ad"), feed_h5ad),
    "annotated h5ad": Reader(file_bytes("mine.h5ad"), feed_clusters),
    "gguf": Reader(gguf_bytes, feed_gguf),
}
CASES = tuple(READERS)


def prepare(folder: Path) -> Bench:
    """The pipeline, a checkpoint, a bundle and a GGUF file to start from."""
    bench = make_bench(folder)
    bench.whole("grpo 1 rank")
    from tests.campaign.disks import keep_a_bundle
    from tests.helpers.gguf_file import tiny_llama, write_gguf

    keep_a_bundle(bench)
    base = folder / "pipeline/base"
    write_gguf(folder / "m.gguf", base, tiny_llama(base))
    return bench


def close(bench: Bench) -> None:
    bench.close()


def play(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    number, examples = rng.randrange(10**9), EXAMPLES.get(name, MOST)
    words = [sys.executable, "-m", "tests.campaign.fuzz", name, number, examples, bench.folder]
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
    )
    (folder / "output.txt").write_text(f"{words}\n{done.stdout[-100_000:]}\n{done.stderr[-100_000:]}", errors="replace")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return f"{examples} inputs of {name}"


def main(name: str, number: int, examples: int, folder: Path) -> None:
    """Feed one reader; the first input that fails is shown, made small by hypothesis, and ends the process."""
    reader = READERS[name]

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @given(reader.inputs(folder))
    def feed(value: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            reader.feed(value, Path(scratch))

    import h5py  # noqa: F401  what readers import counts as the process's own memory
    import pyarrow.parquet  # noqa: F401
    import torch

    torch.set_num_threads(1)
    with open("/proc/self/statm", encoding="ascii") as handle:
        now = int(handle.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    feed()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
