"""The cold start as a run: loss and gradients of transformers, resume, early stopping, DoRA, 4 bits, answers alone."""

import json
import math
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.errors import UserError
from data.puzzles import Puzzle, read_rows
from reward.cellpuzzles import parse_response
from tests.helpers.alone import alone
from tests.helpers.commands import run_command, start_command, succeed
from trainer.policy import Policy
from trainer.sft.examples import encode_traces, note_on_formats, split_by_puzzle
from trainer.sft.heldout import BestEpoch, HeldOutAnswers
from trainer.sft.loop import StepLog, accumulate, evaluate_loss, train
from trainer.sft.settings import SftConfig
from trainer.start.parts import load_policy

CPU = torch.device("cpu")


def words(pipeline, out, *more) -> list[str]:
    given = (
        "--traces",
        pipeline / "traces.jsonl",
        "--model",
        pipeline / "base",
        "--out",
        out,
        "--batch-size",
        8,
        "--lr",
        3e-3,
        "--lora-rank",
        4,
        "--lora-alpha",
        8,
        *more,
    )
    return [str(word) for word in given]


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def config(pipeline, **more) -> SftConfig:
    return SftConfig(
        traces=str(pipeline / "traces.jsonl"), model=str(pipeline / "base"), out="out", lora_rank=0, **more
    )


def test_loss_and_gradients_are_those_of_transformers(pipeline):
    """The causal-LM loss of the same rows, prompt and padding masked with -100, one padded batch."""
    cfg = config(pipeline, micro_tokens=700)  # several packed micro-batches
    policy = Policy(cfg.model, lora_rank=0, lora_alpha=0, seed=0, device=CPU, dtype=torch.float32)
    examples, _ = encode_traces(policy, read_rows(cfg.traces)[:12], cfg)
    with alone() as world:
        loss = accumulate(policy, examples, cfg, world)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    longest = max(len(e.prompt_ids) + len(e.response_ids) for e in examples)
    ids, labels, mask = (torch.full((len(examples), longest), fill) for fill in (0, -100, 0))
    for row, e in enumerate(examples):
        n = len(e.prompt_ids) + len(e.response_ids)
        ids[row, :n] = torch.tensor(e.prompt_ids + e.response_ids)
        labels[row, len(e.prompt_ids) : n] = torch.tensor(e.response_ids)
        mask[row, :n] = 1
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    gradients = dict(model.named_parameters())
    assert len(policy.trainable()) == len(gradients)
    for name, p in policy.trainable().items():
        expected = gradients[name].grad
        assert (p.grad - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max()), name


def run(pipeline, out, judge=None, **more) -> list[dict]:
    """A run in this process (imports are most of a short run's time); returns its metrics."""
    settings = {"batch_size": 8, "lr": 3e-3, "lora_rank": 4, "lora_alpha": 8.0, "epochs": 3, **more}
    files = {"traces": str(pipeline / "traces.jsonl"), "model": str(pipeline / "base"), "out": str(out)}
    with alone():
        train(SftConfig(**{**files, **settings}), judge)
    return metrics(out)


def test_plain_lines_say_how_long_the_run_still_takes(tmp_path, capsys):
    """A line at every tenth of 20 steps: 18 are left, of a minute each on the mean."""
    world = SimpleNamespace(is_main=True, step_made=lambda *step: None)
    log = StepLog(SimpleNamespace(out=tmp_path, n_steps=20, first_step=0, world=world))
    log.bar.disable = True  # as without a terminal
    for step, seconds in ((1, 30.0), (2, 90.0)):
        log.write({"step": step, "loss": 0.5}, {"step": step, "seconds": seconds})
    assert capsys.readouterr().out == 'SFT {"step": 2, "loss": 0.5}  18.0 min left\n'


@pytest.mark.slow(10)
def test_resume_after_a_kill_gives_the_same_metrics_and_model(pipeline, tmp_path):
    """Every run a process of its own: what else a test process has loaded may change the last bit of a sum."""
    more = ("--epochs", 3, "--save-every", 4)
    succeed("sft", *words(pipeline, tmp_path / "whole", *more), fresh=True)
    killed = tmp_path / "killed"
    for _ in range(5):  # on a busy machine it may end before the kill comes, which would prove nothing
        process = start_command("sft", *words(pipeline, killed, *more))
        while process.poll() is None and not list(killed.glob("checkpoints/step-*/state.json")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if (code := process.wait()) == -signal.SIGKILL and not (killed / "model").exists():
            break
        assert code in (0, -signal.SIGKILL)
        shutil.rmtree(killed)
    assert killed.is_dir() and not (killed / "model").exists()
    with pytest.raises(ValueError, match="add --resume to go on with it"):
        run(pipeline, killed, save_every=4)
    with pytest.raises(ValueError, match="--resume: epochs was 3"):
        run(pipeline, killed, save_every=4, epochs=4, resume=True)
    succeed("sft", *words(pipeline, killed, *more, "--resume"))
    assert (killed / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    name = "model/model.safetensors"
    assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sigterm_finishes_the_step_and_saves(pipeline, tmp_path):
    out = tmp_path / "out"
    process = start_command("sft", *words(pipeline, out, "--epochs", 200))
    while not (out / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    done = metrics(out)[-1]["step"]
    assert process.returncode == 0 and f"stopped after step {done} of" in said and not (out / "model").exists()
    assert (out / f"checkpoints/step-{done:06d}/state.json").is_file()


@pytest.mark.slow(2)
def test_early_stopping_keeps_the_best_epoch(pipeline, tmp_path):
    """A learning rate that soon is too high: the loss of the held-out traces rises, the best epoch's weights are kept."""
    out, more = tmp_path / "out", {"patience": 2, "lr": 0.2, "holdout": 0.3}
    losses = [row["eval_loss"] for row in run(pipeline, out, epochs=12, **more) if "eval_loss" in row]
    best = losses.index(min(losses))
    assert len(losses) < 12 and len(losses) - 1 - best == 2, losses
    assert json.loads((out / "best/best.json").read_text()) == {"epoch": best + 1, "eval_loss": losses[best]}
    again = run(pipeline, tmp_path / "again", epochs=1, lr=1e-9, holdout=0.3, model=str(out / "model"))
    assert again[-1]["eval_loss"] == pytest.approx(losses[best], rel=1e-4), "the model on disk is the best epoch's"


def test_a_loss_that_is_low_enough_ends_the_run_within_an_epoch(pipeline, tmp_path):
    """A long run's evaluations every two steps; then one that stops at a loss which that run reached on its way down."""
    every = {"eval_every": 2, "holdout": 0.3, "save_every": 100}
    whole = run(pipeline, tmp_path / "whole", epochs=6, **every)
    steps = math.ceil(whole[-1]["step"] / 6)  # of an epoch
    losses = {row["step"]: row["eval_loss"] for row in whole if "eval_loss" in row}
    assert list(losses) == [row["step"] for row in whole if row["step"] % 2 == 0 or row["step"] % steps == 0]
    within = [step for step in losses if step % steps]  # an epoch
    asked = sorted(losses[step] for step in within)[len(within) // 2]
    ends = next(step for step, loss in losses.items() if loss <= asked)
    assert steps < ends < whole[-1]["step"]
    out = tmp_path / "out"
    assert run(pipeline, out, epochs=6, stop_loss=asked, **every) == whole[:ends]
    assert (out / f"checkpoints/step-{ends:06d}/state.json").is_file()
    model = (out / "model/model.safetensors").read_bytes()
    shutil.rmtree(out / "model")  # killed after the checkpoint, before the model was written
    assert run(pipeline, out, epochs=6, stop_loss=asked, resume=True, **every) == whole[:ends], "no further step"
    assert (out / "model/model.safetensors").read_bytes() == model
    loss = run(pipeline, tmp_path / "again", epochs=1, lr=1e-9, holdout=0.3, model=str(out / "model"))[-1]["eval_loss"]
    assert loss == pytest.approx(losses[ends], rel=1e-4), "the model on disk is the one that was evaluated"


def test_a_nan_is_never_the_best_epoch(tmp_path):
    """Epochs with 2.0, nan, 3.0, 1.5: after a nan, only what is below the best before it is better."""

    class Weights:
        def adapter_tensors(self):
            return {"w": torch.ones(1)}

    with alone() as world:
        cfg = SftConfig(traces="t", model="m", out=str(tmp_path), patience=5)
        best, kept = BestEpoch(tmp_path, cfg, 0, {}), []
        for epoch, loss in enumerate((math.nan, 2.0, math.nan, 3.0, math.inf, 1.5), start=1):
            best.compare(epoch, loss, Weights(), world)
            kept.append((best.epoch, best.loss))
    assert kept == [(0, math.inf), (2, 2.0), (2, 2.0), (2, 2.0), (2, 2.0), (6, 1.5)]
    assert json.loads((tmp_path / "best/best.json").read_text()) == {"epoch": 6, "eval_loss": 1.5}
    assert BestEpoch(tmp_path, cfg, 6, {}).epoch == 6
    (tmp_path / "best").rename(tmp_path / ".best.replaced")  # killed while a better epoch took its place
    assert BestEpoch(tmp_path, cfg, 6, {}).epoch == 6
    shutil.rmtree(tmp_path / "best")  # somebody needed room: a resumed run would put the last epoch into OUT/model
    with pytest.raises(
        UserError, match="--resume: .*best is not there any more, which held the best epoch; put it back"
    ):
        BestEpoch(tmp_path, cfg, 6, {})
    assert BestEpoch(tmp_path, replace(cfg, patience=0), 6, {}).epoch == BestEpoch(tmp_path, cfg, 0, {}).epoch == 0


@pytest.mark.slow(2)
def test_an_eval_loss_of_nan_ends_the_run_unless_patience_kept_an_epoch(pipeline, tmp_path, monkeypatch, capsys):
    losses = iter(())
    monkeypatch.setattr("trainer.sft.loop.evaluate_loss", lambda *_: next(losses))
    losses = iter((2.0, math.nan, 3.0))
    rows = [row for row in run(pipeline, tmp_path / "kept", epochs=9, patience=2) if "eval_loss" in row]
    assert [row["eval_loss"] for row in rows] == [2.0, None, 3.0]
    assert json.loads((tmp_path / "kept/best/best.json").read_text())["epoch"] == 1
    assert (tmp_path / "kept/model").is_dir()
    assert "the eval_loss in epoch 2 is nan; epoch 1 stays the best" in capsys.readouterr().out
    losses = iter((2.0, math.nan))
    with pytest.raises(FloatingPointError, match="the eval_loss in epoch 2 is nan; no checkpoint was made"):
        run(pipeline, tmp_path / "ended", epochs=9)
    (checkpoint,) = (tmp_path / "ended/checkpoints").iterdir()  # of epoch 1
    assert 2 * int(checkpoint.name.removeprefix("step-")) == metrics(tmp_path / "ended")[-1]["step"] + 1
    assert not (tmp_path / "ended/model").exists()


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    "more",
    [{"dora": True}, {"quantize": "nf4"}, {"optimizer": "adamw8bit"}, {"autocast": True, "checkpointing": True}],
    ids=lambda more: "-".join(more),
)
def test_other_ways_to_train_learn_too(pipeline, tmp_path, more):
    losses = [row["loss"] for row in run(pipeline, tmp_path / "out", **more)]
    assert losses[-1] < 0.8 * losses[0] and all(map(math.isfinite, losses))
    policy = Policy(str(tmp_path / "out/model"), lora_rank=0, lora_alpha=0, seed=0, device=CPU, dtype=torch.float32)
    cfg = config(pipeline)
    examples, _ = encode_traces(policy, read_rows(cfg.traces)[:8], cfg)
    with alone() as world:
        assert evaluate_loss(policy, examples, cfg, world) < losses[0] * 0.8, "the merged model is the trained one"


@pytest.mark.slow(1)
def test_the_answer_alone(pipeline, tmp_path):
    cfg = config(pipeline, target="answer")
    policy = Policy(cfg.model, lora_rank=0, lora_alpha=0, seed=0, device=CPU, dtype=torch.float32)
    (example, *_), _ = encode_traces(policy, read_rows(cfg.traces)[:2], cfg)
    text = policy.tokenizer.decode(example.response_ids, skip_special_tokens=True)
    assert text == f"<think></think>\n<answer>{' | '.join(example.puzzle.answer)}</answer>"
    assert parse_response(text, len(example.puzzle.answer)).valid
    bare = {"traces": str(pipeline / "puzzles/train.parquet"), "epochs": 1}  # rows without a trace
    run(pipeline, tmp_path / "a", target="answer", **bare)
    with pytest.raises(ValueError, match="no row has a reasoning trace .* --target answer"):
        run(pipeline, tmp_path / "b", **bare)
    assert (tmp_path / "a/model").is_dir() and not (tmp_path / "b").exists()


def test_the_sampler_sleeps_until_the_first_epoch_is_over(pipeline, tmp_path, monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, *args, **settings):
            calls.append(("made", settings["may_sleep"]))

        def sleep(self):
            calls.append("sleeps")

    monkeypatch.setattr("rollout.vllm_engine.VLLMEngine", Recorder)
    cfg = SftConfig(traces=str(pipeline / "traces.jsonl"), model=str(pipeline / "base"), out=str(tmp_path), lora_rank=8)
    policy = load_policy(cfg, torch.device("cpu"))
    examples, _ = encode_traces(policy, read_rows(cfg.traces)[:4], cfg)
    HeldOutAnswers(cfg, policy, examples, SimpleNamespace(rank=0, size=1), lambda *answers: {})
    assert calls == [("made", True), "sleeps"]


@pytest.mark.vllm
@pytest.mark.slow(10)
def test_held_out_puzzles_are_answered_through_vllm(pipeline, tmp_path):
    """The five metrics, on two ranks of which one answers a puzzle less; then other traces under the same name."""
    shutil.copy(pipeline / "traces.jsonl", tmp_path / "traces.jsonl")
    more = ("--epochs", 2, "--eval-engine", "vllm", "--eval-puzzles", 5, "--eval-response-tokens", 16)
    arguments = words(pipeline, tmp_path / "out", *more, "--traces", tmp_path / "traces.jsonl")
    succeed("sft", *arguments, ranks=2)
    rows = [row for row in metrics(tmp_path / "out") if "eval_loss" in row]
    assert len(rows) == 2
    names = ("cell_accuracy", "batch_accuracy", "format_validity", "uniqueness", "response_length")
    for row in rows:
        assert {f"eval/{name}" for name in names} <= row.keys()
        assert 0 <= row["eval/format_validity"] <= 1 and 0 < row["eval/response_length"] <= 16
    lines = (tmp_path / "traces.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "traces.jsonl").write_text("".join(lines[1:]))
    refused = run_command("sft", *arguments, "--resume")
    assert refused.returncode == 2 and "traces.jsonl is not the file that" in refused.stderr


def test_a_puzzle_is_on_one_side_whatever_its_ids(pipeline):
    cfg = config(pipeline)
    policy = Policy(cfg.model, lora_rank=0, lora_alpha=0, seed=0, device=CPU, dtype=torch.float32)
    rows = read_rows(cfg.traces)[:30]
    twice = [*rows, *({**row, "id": f"again-{row['id']}"} for row in rows)]
    kept, held_out = split_by_puzzle(encode_traces(policy, twice, cfg)[0], 0.1, seed=0)
    prompts = [{e.puzzle.user_message for e in side} for side in (kept, held_out)]
    assert len(held_out) == 6 and not prompts[0] & prompts[1]
    of_few = split_by_puzzle(encode_traces(policy, rows[:4], cfg)[0], 0.1, seed=0)
    assert [len(side) for side in of_few] == [3, 1], "a share that rounds to none is one"
    assert [len(side) for side in split_by_puzzle(of_few[0][:1], 0.1, seed=0)] == [1, 0]


def test_rows_without_a_trace_are_said(pipeline, tmp_path):
    rows = read_rows(pipeline / "traces.jsonl")[:3]
    cfg = config(pipeline)
    assert note_on_formats(rows, cfg) == ""
    bare = [rows[0], rows[1] | {"assistant_msg": " | ".join(Puzzle.from_row(rows[1]).answer)}]
    said = f"1 of 2 rows of {cfg.traces} have no trace in the answer format, the first in row 1:"
    assert note_on_formats(bare, cfg).startswith(said)
    assert note_on_formats(bare, replace(cfg, target="answer")) == ""


def without_safetensors(pipeline, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(pipeline / "base", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_settings_that_contradict(pipeline, tmp_path):
    cfg = config(pipeline)
    policy = Policy(cfg.model, lora_rank=0, lora_alpha=0, seed=0, device=CPU, dtype=torch.float32)
    longest = max(len(e.prompt_ids + e.response_ids) for e in encode_traces(policy, read_rows(cfg.traces), cfg)[0])
    short = shutil.copytree(cfg.model, tmp_path / "short")
    shape = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": longest - 1}
    (short / "config.json").write_text(json.dumps(shape))
    turned = shutil.copytree(short, tmp_path / "turned")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (turned / "config.json").write_text(json.dumps(shape | {"rope_parameters": rope}))
    for more, says in (
        (
            {"model": str(turned)},
            f"the model {longest - 1} positions that do not depend on the texts beside it; give --max-tokens",
        ),
        ({"overlong": "refuse", "max_tokens": longest - 1}, f"are longer than --max-tokens {longest - 1}; raise it"),
        (
            {"model": str(short)},
            f"a trace has {longest} tokens with its prompt, and the model {longest - 1} positions; give --max-tokens",
        ),
        ({"dora": True, "eval_engine": "vllm"}, "cannot serve a DoRA adapter"),
        ({"patience": 2, "holdout": 0.0}, "--holdout 0: keeps no puzzle for --patience; give a share above 0"),
        ({"stop_loss": 0.1, "eval_every": 5, "holdout": 0.0}, "keeps no puzzle for --eval-every, --stop-loss; give"),
        ({"quantize": "nf4", "lora_rank": 0}, "--lora-rank must be above 0"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"lr": -1.0}, "--lr -1.0: must be above 0"),
        ({"grad_clip": 0.0}, "--grad-clip 0.0: must be above 0"),
        (
            {"eval_engine": "vllm", "eval_response_tokens": 100_000},
            "--eval-response-tokens 100000: with prompts of up to",
        ),
        ({"model": str(without_safetensors(pipeline, tmp_path))}, "its weights are in .bin files"),
    ):
        with pytest.raises(ValueError, match=says):
            run(pipeline, tmp_path / "x", **more)
        assert not (tmp_path / "x").exists()
