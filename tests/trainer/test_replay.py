"""Step bundles, their replay, the loss ledger, and the first bad token: with real runs of the command."""

import csv
import importlib.util
import json
import math
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from data.errors import UserError
from data.puzzles import read_puzzles, write_puzzles
from tests.helpers.browser import find_chromium
from tests.helpers.commands import SMALL_GRPO, run_command, succeed
from trainer.config import GrpoConfig
from trainer.grpo import Step, refuse_what_is_not_finite
from trainer.model.opening import open_checkpoint
from trainer.objective import aggregation_weights, grpo_terms
from trainer.record.bundle import read_bundle
from trainer.record.nonfinite import first_bad_gradient, first_bad_token


@pytest.fixture(scope="module")
def length_reward(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("reward") / "short.py"
    file.write_text("def fewer_letters(completion, puzzle):\n    return -len(completion) / 50\n")
    return f"{file}:fewer_letters"


def grpo(pipeline: Path, out: Path, reward: str, *more: object, base: Path | None = None, run=succeed, **kwargs):
    data = ("--model", base or pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet")
    return run("grpo", *data, "--out", out, "--reward", reward, *SMALL_GRPO, *more, **kwargs)


@pytest.fixture(scope="module")
def on_policy(pipeline, tmp_path_factory, length_reward) -> Path:
    """Two steps of the torch engine in one process, every step kept."""
    out = tmp_path_factory.mktemp("on-policy") / "run"
    grpo(pipeline, out, length_reward, "--steps", 2, "--engine", "torch", "--save-steps", "every:1", "--beta", 0.1)
    return out


@pytest.fixture(scope="module")
def off_policy(pipeline, tmp_path_factory, length_reward) -> Path:
    """Two batches of vLLM samples on two ranks, two updates of each with narrow clips, micro-batches of a few responses."""
    out = tmp_path_factory.mktemp("off-policy") / "run"
    grpo(
        pipeline,
        out,
        length_reward,
        "--steps",
        2,
        "--updates-per-batch",
        2,
        "--save-steps",
        "1",
        "--clip-low",
        1e-4,
        "--clip-high",
        2e-4,
        "--micro-tokens",
        250,
        ranks=2,
    )
    return out


def replay(*arguments: object):
    """launch/replay.py in this process: (exit code, standard output, standard error)."""
    from launch.replay import main

    threads = torch.get_num_threads()
    done = CliRunner().invoke(main, [str(word) for word in arguments])
    torch.set_num_threads(threads)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.stdout, done.stderr


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_one_process_replays_bit_for_bit(on_policy, tmp_path):
    bundles = sorted((on_policy / "steps").iterdir())
    assert [b.name for b in bundles] == ["step-000001", "step-000002"]
    text = succeed("replay", bundles[1])
    assert re.search(r"loss +recorded .*equal", text) and re.search(r"gradient_hash +recorded .*equal", text)
    assert "reference log-probs computed again: largest difference 0\n" in text
    recorded = json.loads((bundles[1] / "bundle.json").read_text())["recorded"]
    metrics = [json.loads(line) for line in (on_policy / "metrics.jsonl").read_text().splitlines()][1]
    assert recorded["loss"] == metrics["loss"] and recorded["grad_norm"] == metrics["grad_norm"]
    assert metrics["sampling/logp_difference/max"] < 1e-4  # the torch engine samples with the trainer's own model


@pytest.mark.vllm
@pytest.mark.slow(5)
@pytest.mark.parametrize("update", [1, 2])
def test_two_ranks_with_vllm_replay_bit_for_bit(off_policy, tmp_path, update):
    """Several micro-batches, an update whose ratios are not 1, and clips."""
    bundle = off_policy / f"steps/step-000001-update-{update}"
    code, text, _ = replay(bundle, "--ledger", tmp_path / "tokens.csv")
    assert code == 0
    assert re.search(r"loss +recorded .*equal", text) and re.search(r"gradient_hash +recorded .*equal", text)
    steps = [json.loads(line) for line in (off_policy / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(
        step["sampling/logp_difference/max"] < 1e-4 for step in steps
    )  # both ranks sample from the adapter of step 1
    rows = read_csv(tmp_path / "tokens.csv")
    assert {row["rank"] for row in rows} == {"0", "1"}
    ratios = {float(row["ratio"]) for row in rows}
    fired = {row["clip"] for row in rows}
    assert (ratios == {1.0}) == (update == 1)
    assert fired == ({""} if update == 1 else {"", "low", "high"})


def test_the_ledger_sums_to_the_loss_and_agrees_with_the_rollouts(on_policy, tmp_path):
    bundle = on_policy / "steps/step-000002"
    code, text, _ = replay(bundle, "--ledger", tmp_path / "tokens.csv")
    assert code == 0
    rows = read_csv(tmp_path / "tokens.csv")
    loss = math.fsum(float(row["contribution"]) for row in rows)
    assert loss == pytest.approx(json.loads((bundle / "bundle.json").read_text())["recorded"]["loss"], abs=1e-7)
    assert f"shares sum to {loss:.9g}" in text
    rollouts = [json.loads(line) for line in (on_policy / "rollouts.jsonl").read_text().splitlines()]
    rollouts = [row for row in rollouts if row["step"] == 2]
    assert len({row["row"] for row in rows}) == len(rollouts) == 12
    for place, rollout in enumerate(rollouts):
        own = [row for row in rows if row["row"] == str(place)]
        assert [int(row["token_id"]) for row in own] == rollout["response_ids"]
        assert [float(row["sampler_logprob"]) for row in own] == pytest.approx(rollout["sampler_logprobs"], abs=1e-6)
        assert all(float(row["advantage"]) == pytest.approx(rollout["advantage"], abs=1e-7) for row in own)
        # Eq. (1): each response weighs 1/12, each of its tokens 1/length of that; on-policy the ratio is exactly 1
        kl = sum(float(row["kl"]) for row in own) / len(own)
        share = math.fsum(float(row["contribution"]) for row in own)
        assert share == pytest.approx((-rollout["advantage"] + 0.1 * kl) / 12, abs=1e-9)
        assert {row["ratio"] for row in own} == {"1.0"}
        for row in own:  # low-variance KL from the two log-probs
            d = float(row["ref_logprob"]) - float(row["logprob"])
            assert float(row["kl"]) == pytest.approx(math.exp(d) - d - 1, abs=1e-12)


@pytest.mark.slow(2)
def test_one_response_explained_and_the_page(on_policy, tmp_path):
    bundle = on_policy / "steps/step-000002"
    page = tmp_path / "step.html"
    code, text, _ = replay(bundle, "--row", 4, "--html", page)
    assert code == 0
    rollout = [json.loads(line) for line in (on_policy / "rollouts.jsonl").read_text().splitlines()][12 + 4]
    assert f"Response 4: puzzle {rollout['puzzle_id']}, response 2 of 3" in text
    assert f"= {rollout['advantage']:+.6g}" in text or "all equal: 0" in text
    filled = re.search(r"share +weight .* = (\S+) \((\S+) x (\S+) \+ 0.1 x (\S+)\) = (\S+)", text)
    weight, surrogate, correction, kl, share = map(float, filled.groups())
    assert weight * (surrogate * correction + 0.1 * kl) == pytest.approx(share, rel=1e-4)
    html = page.read_text()
    assert (
        "http" not in html.replace("http://www.w3.org", "").replace("http-equiv", "") and html.count('"token":') == 12
    )
    if browser := find_chromium():
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
        words = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"file://{page}"]
        dom = subprocess.run(words, capture_output=True, text=True, timeout=600, check=True).stdout
        assert dom.count("<article>") == 3 and "share of the loss" in dom and 'class="tokens"' in dom


def test_another_base_checkpoint_is_noticed(pipeline, on_policy, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(pipeline / "base", other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    tensors[name][0, 0] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, text, _ = replay(on_policy / "steps/step-000001", "--model", other)
    assert code == 1 and "DIFFERS" in text
    difference = re.search(r"reference log-probs computed again: largest difference (\S+)", text)
    assert float(difference[1]) > 1e-4


def test_a_checkpoint_with_fewer_words_is_refused(pipeline, on_policy, tmp_path):
    """Of the same shape, so that the adapter fits: every embedded policy has a word list of its own."""
    few = read_puzzles(pipeline / "puzzles/train.parquet")[:1]
    write_puzzles(tmp_path / "one.jsonl", few)
    shape = json.loads((pipeline / "base/config.json").read_text())
    names = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    names |= {"kv-heads": "num_key_value_heads", "intermediate": "intermediate_size"}
    words = [word for flag, name in names.items() for word in (f"--{flag}", shape[name])]
    succeed("create_policy", "--puzzles", tmp_path / "one.jsonl", "--out", tmp_path / "small", *words)
    code, _, error = replay(on_policy / "steps/step-000001", "--model", tmp_path / "small")
    assert (
        code == 2
        and re.search(r"step-000001: holds token \d+, and .*small has \d+", error)
        and "Traceback" not in error
    )


def test_a_replay_uses_the_attention_of_this_machine_and_needs_no_optimizer(on_policy, tmp_path, monkeypatch):
    """A bundle of a GPU run with flash-attn and 8-bit AdamW, looked at on a laptop without these packages."""
    bundle = tmp_path / "step-000001"
    shutil.copytree(on_policy / "steps/step-000001", bundle)
    content = json.loads((bundle / "bundle.json").read_text())
    content["settings"] |= {"attn": "flash", "optimizer": "adamw8bit"}
    (bundle / "bundle.json").write_text(json.dumps(content))
    find = importlib.util.find_spec
    without = lambda name, *more: None if name == "bitsandbytes" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    code, text, error = replay(bundle)
    # the numbers recorded here are of PyTorch's kernels, so they are found again
    assert code == 0 and re.search(r"gradient_hash +recorded .*equal", text), error
    assert "note: the run used --attn flash, the replay uses PyTorch's kernels: equal bytes are not promised\n" in text
    content["settings"] |= {"attn": "sdpa", "quantize": "nf4"}
    (bundle / "bundle.json").write_text(json.dumps(content))
    code, _, error = replay(bundle)
    assert code == 2 and f"{bundle}: cannot be replayed here: --quantize nf4" in error and "damaged" not in error
    content["settings"] |= {"quantize": "none", "autocast": True, "dtype": "float32"}
    (bundle / "bundle.json").write_text(json.dumps(content))
    monkeypatch.setattr("trainer.inspect.replay.has_bfloat16_products", lambda device: False)
    monkeypatch.setattr("trainer.start.parts.has_bfloat16_products", lambda device: False)
    assert "note: no --autocast on this CPU: equal bytes are promised only if" in replay(bundle)[1]
    monkeypatch.undo()
    # and nothing is said of a replay that computes as its run
    assert "note:" not in replay(on_policy / "steps/step-000001")[1]


def test_a_bad_bundle_is_one_sentence(on_policy, tmp_path):
    bundle = tmp_path / "step-000001"
    shutil.copytree(on_policy / "steps/step-000001", bundle)
    data = bytearray((bundle / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "tensors.safetensors").write_bytes(data)
    for arguments, says in (
        ([bundle], "tensors.safetensors: damaged or missing"),
        ([tmp_path / "nowhere"], "no step bundle there"),
        ([on_policy / "steps/step-000001", "--row", 99], "--row 99: the step has responses 0 to 11"),
        ([on_policy / "steps/step-000001", "--ledger", "x.txt"], "name a file that ends in .csv"),
    ):
        code, _, error = replay(*arguments)
        assert code == 2 and says in error, error


def test_a_bundle_json_that_lacks_or_changes_something_is_one_sentence(on_policy, tmp_path):
    bundle = tmp_path / "step-000001"
    shutil.copytree(on_policy / "steps/step-000001", bundle)
    whole = json.loads((bundle / "bundle.json").read_text())
    lacking = [{key: value for key, value in whole.items() if key != name} for name in whole if name != "format"]
    changed = [whole | {name: value} for name in ("settings", "ranks", "n_rows") for value in (None, [], "x", [[]])]
    readable = 0
    for content in [*map(json.dumps, lacking + changed), "[" * 100_000, '{"format": ' + "9" * 5000]:
        (bundle / "bundle.json").write_text(content)
        try:
            read_bundle(bundle)
            readable += 1
        except UserError as error:
            assert str(error).startswith(str(bundle)) and "\n" not in str(error)
    assert readable <= 5, "what is only shown, and an empty list of ranks"


@pytest.mark.slow(1)
def test_a_nan_stops_the_run_names_the_token_and_leaves_a_bundle(pipeline, tmp_path, length_reward):
    """A checkpoint that is finite, and fine until a response holds a token that no prompt has.

    Their embeddings are 0 and the norms subtract a little from the variance, so its root is that of a negative number.
    """
    chat = open_checkpoint(pipeline / "base").chat
    prompts = {i for p in read_puzzles(pipeline / "puzzles/train.parquet") for i in chat.prompt_ids(p.chat())}
    broken = tmp_path / "base"
    shutil.copytree(pipeline / "base", broken)
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": -1e-6}))
    tensors = load_file(broken / "model.safetensors")
    rest = [i for i in range(settings["vocab_size"]) if i not in prompts]
    tensors["model.embed_tokens.weight"][rest] = 0.0
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    done = grpo(pipeline, out, length_reward, "--steps", 5, "--engine", "torch", base=broken, run=run_command, ranks=2)
    assert done.returncode == 1, done.stderr[-3000:]
    where = r"puzzle (\S+), response (\d+), token (\d+) of \d+ \(id \d+\), rank [01]"
    said = re.search(rf"Error: step (\d+), update 1: {where}: (\w+) is not", done.stderr)
    assert said and "This update was not made" in done.stderr
    assert not list((out / "checkpoints").glob("*")) if (out / "checkpoints").exists() else True
    bundle = out / f"steps/step-{int(said[1]):06d}"
    code, text, _ = replay(bundle, "--row", 0)
    assert code == 0 and "nothing was written for them" in text
    assert f"puzzle {said[2]}, response {said[3]}, token {said[4]}: {said[5]} is not finite" in text


@pytest.mark.slow(2)
def test_a_sharded_run_says_only_what_it_looked_for_and_its_replay_finds_the_token(on_policy, tmp_path, monkeypatch):
    """A gradient that overflows while every term is finite: no rank of a sharded run can look for the token alone."""
    config = GrpoConfig(group_size=3)
    monkeypatch.setattr("trainer.grpo.write_bundle", lambda out, record, batch, world: record.problem)
    alone = SimpleNamespace(largest=lambda value: value, gather_in_rank_order=lambda item: [item])
    policy = SimpleNamespace(sharded=True, adapter_tensors=dict)
    now = Step(step=0, cfg=config, policy=policy, optimizer=None, world=alone, out=tmp_path)
    inputs = SimpleNamespace(update=1, micro_batches=[], responses=[])
    alone.rank = 0
    with pytest.raises(FloatingPointError) as raised:
        refuse_what_is_not_finite(now, None, inputs, None, torch.tensor(math.inf))  # None: there is no learner to ask
    said = str(raised.value)
    assert "each token" not in said and "is not finite; under --shard fsdp the replay looks for the token" in said
    # the bundle of such a step: lora_B is 0 before step 1, so a huge alpha changes its gradient and no log-prob
    bundle = tmp_path / "step-000001"
    shutil.copytree(on_policy / "steps/step-000001", bundle)
    content = json.loads((bundle / "bundle.json").read_text())
    tensors = load_file(bundle / "tensors.safetensors")
    content["settings"]["lora_alpha"] = 1e30
    for name in tensors:
        if name.endswith("advantages"):
            tensors[name] *= 1e12
    save_file(tensors, bundle / "tensors.safetensors")
    content["crc32"] = zlib.crc32((bundle / "tensors.safetensors").read_bytes())
    content |= {"problem": said, "recorded": {}}
    (bundle / "bundle.json").write_text(json.dumps(content))
    code, text, error = replay(bundle)
    assert code == 0, text + error
    (micro,) = content["ranks"][0]["micro_batches"]
    place = next(i for i, value in enumerate(tensors["0.0.advantages"].tolist()) if value)
    response = content["ranks"][0]["responses"][micro["rows"][place]]
    assert (
        f"replayed    puzzle {response['puzzle_id']}, response {response['response']}, token 1: gradient is not finite"
        in text
    )


def terms_from(logprobs: torch.Tensor, advantage: float = 1.0):
    mask = torch.tensor([[True, True, True], [True, True, False]])
    weight = aggregation_weights(mask, "token-mean", 2, 5, dtype=logprobs.dtype)
    old = torch.zeros_like(logprobs)
    return grpo_terms(
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=old,
        sampler_logprobs=old,
        mask=mask,
        advantages=torch.tensor([advantage, -advantage]),
        weight=weight,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        beta=0.1,
        kl_kind="k3",
        ratio_level="token",
        correction="none",
        correction_cap=2.0,
    )


def test_the_first_bad_term_is_named_with_its_values():
    assert first_bad_token(terms_from(torch.tensor([[-0.1, -0.2, -0.3], [-0.1, -0.2, float("nan")]]))) is None
    bad = first_bad_token(terms_from(torch.tensor([[-0.1, -0.2, -0.3], [-0.1, float("nan"), float("nan")]])))
    assert (bad.row, bad.position, bad.what) == (1, 1, "logprobs") and bad.values["advantage"] == -1.0
    # exp(100) overflows float32 in k3 while ratio and log-prob are fine
    bad = first_bad_token(terms_from(torch.tensor([[-0.1, -100.0, -0.3], [-0.1, -0.2, -0.3]])))
    assert (bad.row, bad.position, bad.what) == (0, 1, "kl")


def test_the_token_whose_gradient_overflows_is_found():
    """log-prob scale * w, w = -1e-38: finite, while advantage * scale is not."""
    weights = torch.full((2, 3), -1e-38, requires_grad=True)
    scale = torch.tensor([[1e37, 1e37, 1e37], [1e37, 1e38, 1e38]])
    bad = first_bad_gradient(lambda: terms_from(scale * weights, advantage=-100.0), [weights])
    assert (bad.row, bad.position, bad.what) == (1, 1, "gradient")
    assert first_bad_gradient(lambda: terms_from(scale * weights), [weights]) is None
