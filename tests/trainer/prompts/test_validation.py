"""--validate, --keep-best and launch/hold_out.py: who is held out, what is measured, and that the run is otherwise the same."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.build.splits import hold_out_donors
from data.clusters.known import read_labels
from data.errors import UserError
from data.puzzles import Puzzle, read_puzzles, write_puzzles
from launch.grpo import held_out_puzzles, paper_metrics
from tests.helpers.commands import ROOT, SMALL_GRPO, kill_at, run_command, succeed
from trainer.config import GrpoConfig
from trainer.prompts.validation import Validator, refuse_leaks
from trainer.start.preflight import refuse_learned

SCRIPT = ROOT / "tests/helpers/validated.py"
SMALL = (*SMALL_GRPO, "--engine", "torch", "--reward-workers", 0, "--save-every", 2, "--date", "2026-11-26")
VALIDATE = ("--validate-every", 1, "--keep-best", "--keep-checkpoints", 1)
PPO = ("--critic-lr", 1e-2, "--epochs", 2)


def puzzle(name: str, donor: str | None, gene: str = "CD3D") -> Puzzle:
    return Puzzle(
        id=name,
        context="The cell is from a female, originating from the blood.",
        cells=[[gene, "IL7R"], ["CD79A", "MS4A1"]],
        candidates=["B cell", "T cell"],
        answer=["T cell", "B cell"],
        meta={"donor": donor, "tissue": "blood"} if donor else {},
    )


@pytest.fixture(scope="module")
def held(pipeline, tmp_path_factory) -> Path:
    """train.parquet and validation.parquet by launch/hold_out.py, small.parquet with five of the latter, a reward."""
    out = tmp_path_factory.mktemp("held") / "held"
    said = succeed("hold_out", "--puzzles", pipeline / "puzzles/train.parquet", "--out", out, "--fraction", 0.2)
    train, validation = (read_puzzles(out / f"{name}.parquet") for name in ("train", "validation"))
    assert f"{len(train)} puzzles of " in said and f"{len(validation)} of " in said
    write_puzzles(out / "small.parquet", validation[:5])  # 5: uneven over two ranks
    (out / "short.py").write_text("def fewer_letters(completion, puzzle):\n    return -len(completion) / 50\n")
    return out


@pytest.fixture(scope="module")
def options(pipeline, held) -> tuple:
    data = ("--model", pipeline / "base", "--puzzles", held / "train.parquet", "--validate", held / "small.parquet")
    return (*data, "--reward", f"{held / 'short.py'}:fewer_letters", *SMALL, *VALIDATE)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """Five steps in one process, validated after each."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(SCRIPT, "grpo", *options, "--out", out, "--steps", 5)
    return out


STILL = ("--steps", 2, "--lr", 1e-12)
"""Settings under which the weights stay what they are, but for their last digits."""


@pytest.fixture(scope="module")
def still(options, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("still") / "run"
    succeed(SCRIPT, "grpo", *options, *STILL, "--out", out)
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def accuracies(out: Path) -> list[float]:
    return [row["validation/batch_accuracy"] for row in metrics(out)]


def checkpoints(out: Path) -> set[str]:
    return {path.name for path in (out / "checkpoints").iterdir()}


@pytest.mark.slow(4)
def test_the_best_checkpoint_is_kept_beside_the_newest(whole):
    found = accuracies(whole)
    assert len(found) == 5 and len(set(found)) > 1, "a measure that never changes would prove nothing"
    best = found.index(max(found)) + 1  # the first of equals
    assert (whole / "best").resolve() == (whole / f"checkpoints/step-{best:06d}").resolve()
    assert checkpoints(whole) == {f"step-{best:06d}", "step-000005"}
    state = json.loads((whole / "checkpoints/step-000005/state.json").read_text())
    assert state["best"] == {"step": best, "batch_accuracy": max(found)}
    timing = [json.loads(line) for line in (whole / "timing.jsonl").read_text().splitlines()]
    assert all(row["timing_s/validate"] > 0 for row in timing)


@pytest.mark.slow(4)
def test_kill_and_resume_give_the_same_bytes_and_the_same_best(options, whole, tmp_path):
    kill_at("step 4/", tmp_path / "cut", SCRIPT, "grpo", *options, "--out", tmp_path / "cut", "--steps", 5)
    succeed(SCRIPT, "grpo", *options, "--out", tmp_path / "cut", "--steps", 5, "--resume")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name
    assert (tmp_path / "cut/best").readlink() == (whole / "best").readlink()
    assert checkpoints(tmp_path / "cut") == checkpoints(whole)
    other = run_command(SCRIPT, "grpo", *options, "--out", tmp_path / "cut", "--resume", "--validate-every", 3)
    assert other.returncode == 2 and "--resume: validate_every was 1" in other.stderr


@pytest.mark.slow(4)
@pytest.mark.parametrize("more", [(), ("--placement", "split")], ids=["colocate", "split"])
def test_two_processes_measure_the_same(options, still, tmp_path, more):
    """Of the same weights: sums over ranks are rounded in another order, and a random policy's answers turn on that."""
    succeed(SCRIPT, "grpo", *options, *more, *STILL, "--out", tmp_path / "run", ranks=2)
    assert accuracies(tmp_path / "run") == accuracies(still) and 0 < accuracies(still)[0] < 1
    assert (tmp_path / "run/best").readlink() == (still / "best").readlink()


@pytest.mark.slow(2)
def test_a_run_learns_the_same_with_and_without_validation(options, whole, tmp_path):
    without = [word for word in options if word not in VALIDATE and word != "--validate"]
    without.remove(options[5])
    succeed("grpo", *without, "--out", tmp_path / "run", "--steps", 5)
    rows = metrics(tmp_path / "run")
    assert not any(name.startswith("validation/") for row in rows for name in row)
    assert rows == [{k: v for k, v in row.items() if not k.startswith("validation/")} for row in metrics(whole)]


def test_the_labels_of_held_out_donors_alone_are_not_told(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    rows = [puzzle(f"p{i}", f"donor {i}", gene=f"G{i}") for i in range(4)]
    pair = ["monocyte", "B cell"]
    rows.append(replace(rows[3], id="p4", cells=[["LYZ"], ["MS4A1"]], candidates=pair, answer=pair))
    write_puzzles(mine / "train.parquet", rows)
    label = {"ontology_term_id": None, "tissues": ["blood"], "n": 9}
    names, genes = ["B cell", "T cell", "monocyte"], sorted({g for p in rows for cell in p.cells for g in cell})
    (mine / "labels.json").write_text(json.dumps({"labels": dict.fromkeys(names, label), "genes": genes}))
    for seed in range(20):
        succeed("hold_out", "--puzzles", mine / "train.parquet", "--out", tmp_path / f"held{seed}", "--seed", seed)
        known = read_labels(tmp_path / f"held{seed}/labels.json")
        train = read_puzzles(tmp_path / f"held{seed}/train.parquet")
        assert set(known.labels) == {one for p in train for one in p.answer}
        assert set(known.genes) == {gene for p in train for cell in p.cells for gene in cell}
        if "monocyte" not in known.labels:
            return
    raise AssertionError("donor 3 was never held out")


def test_a_run_that_ends_before_its_first_validation_says_so(held, capsys):
    cfg = GrpoConfig(validate=str(held / "small.parquet"), steps=10)
    training = read_puzzles(held / "train.parquet")
    held_out_puzzles(cfg, training)
    assert "note: --validate-every 20: 10 steps end before it" in capsys.readouterr().err
    held_out_puzzles(replace(cfg, steps=20), training)
    assert "--validate-every" not in capsys.readouterr().err


@pytest.mark.slow(6)
def test_ppo_validates_and_resumes_to_the_same_bytes(options, tmp_path):
    words = (*options, *PPO, "--validate-every", 2)
    succeed(SCRIPT, "ppo", *words, "--out", tmp_path / "whole", "--steps", 4)
    succeed(SCRIPT, "ppo", *words, "--out", tmp_path / "cut", "--steps", 2)
    succeed(SCRIPT, "ppo", *words, "--out", tmp_path / "cut", "--steps", 4, "--resume")
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    has = ["validation/batch_accuracy" in row for row in metrics(tmp_path / "whole")]
    assert has == [False, True, False, True]


@pytest.mark.vllm
@pytest.mark.slow(40)
@pytest.mark.timeout(3600)
def test_validation_leaves_no_trace_in_vllm_and_a_resumed_run_writes_the_same_bytes(options, tmp_path):
    """vLLM keeps the keys of prompts that it has seen; a step after a validation must find what a resumed run finds."""
    words = [word for word in options if word not in ("--engine", "torch")]
    succeed(SCRIPT, "grpo", *words, "--out", tmp_path / "whole", "--steps", 3)
    succeed(SCRIPT, "grpo", *words, "--out", tmp_path / "cut", "--steps", 2)
    succeed(SCRIPT, "grpo", *words, "--out", tmp_path / "cut", "--steps", 3, "--resume")
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    without = [word for word in words if word not in VALIDATE and word not in ("--validate", options[5])]
    succeed("grpo", *without, "--out", tmp_path / "without", "--steps", 3)
    rows = [{k: v for k, v in row.items() if not k.startswith("validation/")} for row in metrics(tmp_path / "whole")]
    assert metrics(tmp_path / "without") == rows and len({row["adapter_hash"] for row in rows}) == 3


def test_the_papers_five_are_measured():
    texts = ["<think>x</think><answer>T cell | B cell</answer>", "<think>x</think><answer>T cell | T cell</answer>"]
    found = paper_metrics(texts, [puzzle("a", "D1"), puzzle("b", "D2")], [10, 20])
    assert found == {
        "batch_accuracy": 0.5,
        "cell_accuracy": 0.75,
        "format_validity": 1.0,
        "uniqueness": 0.75,
        "response_length": 15.0,
    }


# ---- who may be held out


def test_a_leak_is_refused_by_name():
    train = [puzzle("train-1", "D1"), puzzle("train-2", "D2", "CD8A")]
    assert refuse_leaks([puzzle("train-3", "D3", "NKG7")], train, "v.parquet") == ""
    with pytest.raises(UserError, match=r"v.parquet: shares 1 donor \(D2\) with --puzzles; hold out whole donors"):
        refuse_leaks([puzzle("train-3", "D3", "NKG7"), puzzle("train-4", "D2", "GNLY")], train, "v.parquet")
    with pytest.raises(UserError, match=r"shares 1 equal puzzle \(mine and train-1\) with --puzzles"):
        refuse_leaks([puzzle("mine", "D3")], train, "v.parquet")
    for name, file in (("test-000001", "v.parquet"), ("unseen-000001", "v.parquet"), ("mine", "some/test.jsonl")):
        with pytest.raises(UserError, match="of a test split, by which nothing may be chosen"):
            refuse_leaks([puzzle(name, "D3", "NKG7")], train, file)
    note = refuse_leaks([puzzle("mine", None, "NKG7")], train, "v.parquet")
    assert note == "--validate v.parquet: not every puzzle states its donor, so a shared one is not seen"


def test_what_the_cold_start_learned_is_no_held_out_puzzle(tmp_path, monkeypatch):
    """The order of the README before it said so: distill and train on all donors, then hold some out."""
    traces = [puzzle("train-1", "D1"), puzzle("train-2", "D2", "CD8A")]
    write_puzzles(tmp_path / "traces.parquet", traces)
    run = tmp_path / "mine/sft"
    (run / "model").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"settings": {"traces": "traces.parquet", "model": "base"}}))
    cfg = GrpoConfig(model=str(run / "model"), validate="v.parquet")
    assert refuse_learned([puzzle("train-3", "D3", "NKG7")], cfg) == ""
    with pytest.raises(
        UserError, match=r"shares 1 equal puzzle \(train-1 and train-1\) with .*traces.parquet, on which"
    ):
        refuse_learned([puzzle("train-1", "D1")], cfg)
    told = (
        f"shares 1 equal puzzle (train-1 and train-1) with {tmp_path / 'traces.parquet'}, on which --model was trained"
    )
    assert told in refuse_learned([puzzle("train-1", "D1")], replace(cfg, resume=True))
    assert "shares 1 donor (D2) with " in refuse_learned([puzzle("train-4", "D2", "GNLY")], cfg)
    (tmp_path / "traces.parquet").unlink()
    assert "traces.parquet, on which --model was trained, is gone" in refuse_learned([puzzle("train-1", "D1")], cfg)
    assert refuse_learned(traces, replace(cfg, model=str(tmp_path))) == ""  # no run: nobody knows


@pytest.mark.slow(1)
def test_the_command_refuses_a_leak_before_a_model_is_loaded(pipeline, held, tmp_path):
    given = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", *SMALL)
    cases = [
        (("--validate", held / "validation.parquet"), f"{held / 'validation.parquet'}: shares "),
        (("--validate", pipeline / "puzzles/test.parquet"), "puzzle test-000000 is of a test split"),
        (("--keep-best",), "--keep-best: the best in what? Name held-out puzzles with --validate"),
        (("--validate", held / "validation.parquet", "--max-prompt-tokens", 5), "shares "),
    ]
    for more, says in cases:
        done = run_command("grpo", *given, *more, "--out", tmp_path / "run")
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert not (tmp_path / "run").exists()


def test_donors_are_held_out_whole_and_from_every_tissue():
    puzzles = [puzzle(f"p{i}", f"D{i % 10}") for i in range(40)]
    puzzles = [
        replace(p, meta=p.meta | {"tissue": "blood" if int(p.meta["donor"][1]) < 5 else "lung"}) for p in puzzles
    ]
    train, validation = hold_out_donors(puzzles, 0.4, seed=0)
    donors = [{p.meta["donor"] for p in part} for part in (train, validation)]
    assert not donors[0] & donors[1] and len(donors[1]) == 4 and len(validation) == 16
    assert sorted(p.meta["tissue"] for p in validation) == ["blood"] * 8 + ["lung"] * 8
    assert hold_out_donors(puzzles, 0.4, seed=0) == (train, validation)
    assert hold_out_donors(puzzles, 0.4, seed=1) != (train, validation)
    with pytest.raises(UserError, match="puzzle x states no donor"):
        hold_out_donors([*puzzles, puzzle("x", None)], 0.4, 0)
    with pytest.raises(UserError, match="all puzzles are of donor D0"):
        hold_out_donors(puzzles[::10], 0.4, 0)


def test_a_run_of_an_older_version_had_no_validation():
    assert GrpoConfig().validate is None and not GrpoConfig().keep_best


def test_all_ranks_go_on_from_what_rank_0_reads_as_the_best(tmp_path):
    """Rank 0 has just set a damaged checkpoint aside; rank 1 may still see it under its name."""
    checkpoint = tmp_path / "checkpoints/step-000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("damaged")
    of_rank_0 = {"step": 10, "batch_accuracy": 0.5}
    world = SimpleNamespace(is_main=False, gather_in_rank_order=lambda mine: [of_rank_0, mine])
    validator = Validator(GrpoConfig(), None, world, tmp_path, None)
    validator.restore()
    assert validator.best == of_rank_0
