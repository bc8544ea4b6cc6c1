"""One checkpoint that transformers and vLLM load, and that answers as the trainer does; one chat layout everywhere."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.clusters.known import read_known_labels
from data.errors import UserError
from data.prompts import ChatFormat
from data.puzzles import read_puzzles, read_rows
from launch.export import read_metrics
from rollout import Sampling
from rollout.torch_engine import TorchEngine
from tests.helpers.commands import run_command, succeed
from trainer.model.export import export_model, how_asked, metrics_lines, recipe_lines
from trainer.model.loading import load_tokenizer, through_nf4
from trainer.model.merge import merged_weight, write_checkpoint
from trainer.model.opening import open_checkpoint
from trainer.model.serving import served_base
from trainer.policy import Policy
from trainer.sft.examples import encode_traces
from trainer.sft.settings import SftConfig

CPU = torch.device("cpu")


def noisy_policy(model_dir, **more) -> Policy:
    """A policy whose adapter is not zero."""
    policy = Policy(str(model_dir), lora_rank=4, lora_alpha=8.0, seed=0, device=CPU, dtype=torch.float32, **more)
    torch.manual_seed(1)
    for name, p in policy.trainable().items():
        with torch.no_grad():
            p.add_(0.05 * torch.randn_like(p)) if "lora_" in name else None
    return policy


def adapter_of(policy) -> dict:
    return {name: t.clone() for name, t in policy.adapter_tensors().items()}


@pytest.mark.parametrize("dora", [False, True])
def test_the_merge_is_pefts(pipeline, tmp_path, dora):
    policy = noisy_policy(pipeline / "base", dora=dora)
    write_checkpoint(pipeline / "base", tmp_path / "m", torch.float32, adapter=adapter_of(policy), config=policy.lora)
    ours = load_file(tmp_path / "m/model.safetensors")
    theirs = policy.model.merge_and_unload().state_dict()
    assert ours.keys() <= theirs.keys()
    changed = [
        name for name in ours if not torch.equal(ours[name], load_file(pipeline / "base/model.safetensors")[name])
    ]
    assert len(changed) == 14  # 7 linear layers in each of 2
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_four_bit_base_is_merged_as_it_was_trained(pipeline, tmp_path):
    """The log-probs of the merged checkpoint are those of the policy with its base in 4 bits."""
    policy = noisy_policy(pipeline / "base", quantize="nf4")
    write_checkpoint(
        pipeline / "base",
        tmp_path / "m",
        torch.float32,
        adapter=adapter_of(policy),
        config=policy.lora,
        quantize="nf4",
        base_dtype=torch.float32,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ids = torch.tensor([policy.chat.prompt_ids(read_puzzles(pipeline / "puzzles/test.parquet")[0].chat())])
    with torch.no_grad(), policy.decoding():
        expected = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
        got = merged(input_ids=ids).logits.log_softmax(-1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    untouched = AutoModelForCausalLM.from_pretrained(pipeline / "base", dtype=torch.float32)
    with torch.no_grad():
        assert (untouched(input_ids=ids).logits.log_softmax(-1) - expected).abs().max() > 0.01


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory):
    """A short LoRA run; its checkpoint holds the adapter."""
    out = tmp_path_factory.mktemp("trained") / "sft"
    succeed(
        "sft",
        "--traces",
        pipeline / "traces.jsonl",
        "--model",
        pipeline / "base",
        "--out",
        out,
        "--lora-rank",
        8,
        "--lora-alpha",
        16,
        "--epochs",
        2,
        "--batch-size",
        8,
        "--lr",
        1e-2,
    )
    return out


@pytest.mark.vllm
@pytest.mark.slow(5)
def test_export_and_vllm_answer_as_the_trainer(pipeline, trained, tmp_path):
    """Greedy answers to the same puzzles: the trainer's model with its adapter, and vLLM on the exported one."""
    checkpoint = sorted((trained / "checkpoints").iterdir())[-1]
    succeed("export", "--model", checkpoint, "--out", tmp_path / "merged", "--dtype", "float32")
    puzzles = read_puzzles(pipeline / "puzzles/test.parquet")
    policy = Policy(str(pipeline / "base"), lora_rank=8, lora_alpha=16.0, seed=0, device=CPU, dtype=torch.float32)
    policy.load_adapter(load_file(checkpoint / "adapter_model.safetensors"))
    prompts = [policy.chat.prompt_ids(p.chat()) for p in puzzles]
    greedy = Sampling(n=1, max_tokens=24, temperature=0.0, top_p=1.0, seed=0, stop_ids=policy.chat.stop_ids)
    engine = TorchEngine(policy.model, policy.decoding)
    ours = [group[0].response_ids for group in engine.generate([p.id for p in puzzles], prompts, greedy)]
    succeed(
        "evaluate",
        "--puzzles",
        pipeline / "puzzles/test.parquet",
        "--model",
        tmp_path / "merged",
        "--out",
        tmp_path / "ev",
        "--max-response-tokens",
        24,
    )
    theirs = {row["id"]: row["prediction"] for row in read_rows(tmp_path / "ev/predictions.jsonl")}
    texts = [policy.chat.response_text(ids) for ids in ours]
    assert [theirs[p.id] for p in puzzles] == texts and len(set(texts)) > 1


def test_the_adapter_alone_loads_in_peft(pipeline, trained, tmp_path):
    checkpoint = sorted((trained / "checkpoints").iterdir())[-1]
    succeed("export", "--model", checkpoint, "--out", tmp_path / "a", "--adapter-only")
    base = AutoModelForCausalLM.from_pretrained(pipeline / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload().state_dict()
    for name, weight in load_file(trained / "model/model.safetensors").items():
        torch.testing.assert_close(loaded[name], weight, rtol=1e-5, atol=1e-6)
    assert load_tokenizer_of_adapter(tmp_path / "a")


def load_tokenizer_of_adapter(folder) -> bool:
    return {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"} <= {
        p.name for p in folder.iterdir()
    }


def test_the_card_names_recipe_data_and_metrics(pipeline, trained, tmp_path):
    metrics = {
        "cell_accuracy": 0.5,
        "batch_accuracy": 0.25,
        "format_validity": 1.0,
        "uniqueness": 1.0,
        "response_length": 9,
    }
    (tmp_path / "test").mkdir()
    (tmp_path / "test/metrics.json").write_text(json.dumps(metrics))
    checkpoint = sorted((trained / "checkpoints").iterdir())[-1]
    succeed("export", "--model", checkpoint, "--out", tmp_path / "m", "--metrics", tmp_path / "test/metrics.json")
    card = (tmp_path / "m/README.md").read_text()
    assert "| batch accuracy | 0.25 |" in card and "| lora_rank | 8 |" in card and "| epochs | 2 |" in card
    digest = hashlib.sha256((pipeline / "traces.jsonl").read_bytes()).hexdigest()
    assert f"| traces | traces.jsonl | {digest} |" in card and str(pipeline) not in card and "| adapter r | 8 |" in card
    assert json.loads((trained / "config.json").read_text())["data"] == {"traces": digest}, "of the file as it was then"
    weights = load_file(tmp_path / "m/model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
    exact = load_file(trained / "model/model.safetensors")
    assert all(torch.equal(weights[name], exact[name].bfloat16()) for name in weights), (
        "merged in float32, then rounded"
    )
    assert json.loads((tmp_path / "m/generation_config.json").read_text())["eos_token_id"] is not None


def test_evaluations_on_a_card_are_told_apart():
    """Every metrics.json of launch/evaluate.py names its model, by a path of this machine."""
    one = {"name": "/home/me/run/step-1", "batch_accuracy": 0.5, "response_length": 7.0, "n_puzzles": 1200}
    one |= {"puzzles": {"file": "test.parquet"}, "response_length_unit": "words"}
    head, _, *rows = metrics_lines([one | {"name": "test"}, {"name": "unseen", "response_length": 9}])
    assert head == "| metric | test: 1,200 puzzles of test.parquet | unseen |"
    assert rows[-1] == "| response length | 7 words | 9 tokens |"


def test_the_name_on_a_card_is_that_of_the_folder(tmp_path):
    (tmp_path / "unseen").mkdir()
    (tmp_path / "unseen/metrics.json").write_text(json.dumps({"name": "/home/me/m", "batch_accuracy": 0.5}))
    assert read_metrics(str(tmp_path / "unseen"))["name"] == "unseen"


def test_what_the_model_knows_is_exported_too(pipeline, trained, tmp_path):
    """cell_types.json is the labels.json of the training puzzles; without one the export has none."""
    checkpoint, labels = sorted((trained / "checkpoints").iterdir())[-1], pipeline / "puzzles/labels.json"
    assert read_known_labels(checkpoint) is None and not (trained / "model/cell_types.json").exists()
    succeed("export", "--model", checkpoint, "--out", tmp_path / "a", "--adapter-only", "--labels", labels)
    succeed("export", "--model", checkpoint, "--out", tmp_path / "m", "--labels", labels)
    for name in "am":
        assert (tmp_path / name / "cell_types.json").read_bytes() == labels.read_bytes()
    known = read_known_labels(tmp_path / "a")
    assert known.ontology_term_id("B cell") == "CL:0000236" and "lung" in known.tissues and "CD79A" in known.genes
    refused = run_command("export", "--model", checkpoint, "--out", tmp_path / "x", "--labels", tmp_path / "no.json")
    assert refused.returncode == 2 and "no.json: no such file; launch/build.py writes labels.json" in refused.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow(1)
def test_a_checkpoint_of_every_weight_is_exported_without_the_runs_own_files(pipeline, tmp_path):
    succeed(
        "sft",
        "--traces",
        pipeline / "traces.jsonl",
        "--model",
        pipeline / "base",
        "--out",
        tmp_path / "sft",
        "--labels",
        pipeline / "puzzles/labels.json",
        "--lora-rank",
        0,
        "--epochs",
        1,
        "--batch-size",
        64,
        "--lr",
        1e-3,
    )
    (checkpoint,) = (tmp_path / "sft/checkpoints").iterdir()
    assert [path.name for path in checkpoint.glob("*.safetensors")] == ["model.safetensors"], (
        "vLLM takes all for weights"
    )
    succeed("export", "--model", checkpoint, "--out", tmp_path / "m", "--dtype", "float32")
    names = {path.name for path in (pipeline / "base").iterdir()}
    names |= {"README.md", "generation_config.json", "cell_types.json"}
    labels = (pipeline / "puzzles/labels.json").read_bytes()
    assert (
        (tmp_path / "sft/model/cell_types.json").read_bytes() == (tmp_path / "m/cell_types.json").read_bytes() == labels
    )
    assert {path.name for path in (tmp_path / "m").iterdir()} == names
    ours, theirs = load_file(tmp_path / "m/model.safetensors"), load_file(tmp_path / "sft/model/model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    refused = run_command("export", "--model", checkpoint, "--base", pipeline / "base", "--out", tmp_path / "n")
    assert refused.returncode == 2 and "holds whole weights, which lie over no base" in refused.stderr


def test_what_does_not_go_together_is_named_and_leaves_nothing(pipeline, tmp_path):
    policy = noisy_policy(pipeline / "base")
    adapter, base = adapter_of(policy), pipeline / "base"
    name = next(name for name in adapter if "lora_A" in name)
    other_shape = {**adapter, name: torch.zeros(4, adapter[name].shape[1] + 2)}
    homeless = {**adapter, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 8)}
    without_a, without_b = ({n: t for n, t in adapter.items() if n != name.replace("_A", f"_{s}")} for s in "AB")
    layer = name.removesuffix(".lora_A.weight")
    magnitude = {name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)}
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    (damaged / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    for folder, tensors, settings, says in (
        (base, other_shape, {}, "is it the base this adapter was trained on"),
        (base, homeless, {}, "embed_tokens.lora_embedding_A cannot be merged here; merge it with PEFT"),
        (base, adapter, {"alpha_pattern": {"q_proj": 64}}, "alpha_pattern cannot be merged here; merge it with PEFT"),
        (base, without_a, {}, f"has {layer}.lora_B.weight but no {layer}.lora_A.weight; copy the adapter again"),
        (base, without_b, {}, f"has {layer}.lora_A.weight but no {layer}.lora_B.weight"),
        (base, magnitude, {}, f"has {layer}.lora_magnitude_vector but no {layer}.lora_A.weight"),
        (damaged, adapter, {}, "model.safetensors: damaged"),
    ):
        with pytest.raises(ValueError, match=says):
            write_checkpoint(folder, tmp_path / "m", torch.float32, adapter=tensors, config={**policy.lora, **settings})
        assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


@pytest.mark.slow(1)
def test_what_cannot_be_exported(pipeline, trained, tmp_path):
    for words, says in (
        (("--model", tmp_path, "--out", tmp_path / "x"), "neither a checkpoint (config.json) nor an adapter"),
        (("--model", pipeline / "base", "--out", tmp_path / "x", "--adapter-only"), "holds whole weights, no adapter"),
        (("--model", pipeline / "base", "--out", tmp_path), "exists already"),
        (("--model", pipeline / "base", "--out", tmp_path / "x", "--metrics", tmp_path / "no.json"), "no such file"),
    ):
        done = run_command("export", *words)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    other = tmp_path / "other"  # a base without the adapter's layers
    succeed(
        "create_policy",
        "--puzzles",
        pipeline / "puzzles/train.parquet",
        "--out",
        other,
        "--hidden",
        64,
        "--layers",
        1,
        "--heads",
        2,
        "--kv-heads",
        2,
        "--intermediate",
        128,
    )
    checkpoint = sorted((trained / "checkpoints").iterdir())[-1]
    done = run_command("export", "--model", checkpoint, "--base", other, "--out", tmp_path / "x")
    assert done.returncode == 2 and "was trained on another config.json than" in done.stderr
    alone = adapter_folder(noisy_policy(pipeline / "base"), tmp_path / "alone", pipeline / "base")
    done = run_command("export", "--model", alone, "--base", other, "--out", tmp_path / "x")
    assert done.returncode == 2 and "has no weight for the adapter's" in done.stderr and not (tmp_path / "x").exists()


def test_one_chat_layout_in_distillation_sft_grpo_and_evaluation(pipeline):
    """The bytes of the prompt are the same in all four."""
    puzzle = read_puzzles(pipeline / "puzzles/test.parquet")[0]
    tokenizer = load_tokenizer(str(pipeline / "base"))
    by_hand = (
        f"<|im_start|>system\n{puzzle.system_message}<|im_end|>\n<|im_start|>user\n{puzzle.user_message}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # an endpoint gets the turns and applies the checkpoint's own template to them
    assert [turn["role"] for turn in puzzle.chat()] == ["system", "user"]
    endpoint = tokenizer.apply_chat_template(puzzle.chat(), add_generation_prompt=True, tokenize=False)
    grpo_and_evaluation = tokenizer.decode(ChatFormat(tokenizer, pipeline / "base").prompt_ids(puzzle.chat()))
    policy = Policy(str(pipeline / "base"), lora_rank=0, lora_alpha=0, seed=0, device=CPU, dtype=torch.float32)
    row = {**puzzle.to_row(), "assistant_msg": f"<think>x</think>\n<answer>{' | '.join(puzzle.answer)}</answer>"}
    (example,), _ = encode_traces(policy, [row], SftConfig(traces="t", model="m", out="o"))
    assert endpoint == grpo_and_evaluation == tokenizer.decode(example.prompt_ids) == by_hand
    whole = tokenizer.apply_chat_template(
        [*puzzle.chat(), {"role": "assistant", "content": row["assistant_msg"]}], tokenize=False
    )
    assert tokenizer.decode(example.prompt_ids + example.response_ids) == whole.removesuffix("\n")


def adapter_folder(policy: Policy, folder, base, **settings):
    """The adapter in PEFT's format, with other settings where they are given; None leaves one out."""
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in adapter_of(policy).items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", **policy.lora, "base_model_name_or_path": str(base), **settings}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_rslora_is_scaled_by_the_root_of_its_rank():
    name, adapter = "model.layers.0.mlp.up_proj.weight", {"A": torch.ones(4, 1), "B": torch.ones(1, 4)}
    tensors = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight": t for side, t in adapter.items()}
    config = {"lora_alpha": 2, "r": 4}
    assert merged_weight(torch.zeros(1, 1), name, tensors, config).item() == 4 * 2 / 4
    assert merged_weight(torch.zeros(1, 1), name, tensors, config | {"use_rslora": True}).item() == 4 * 2 / 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init_lora_weights": "pissa"}, 'begun with init_lora_weights "pissa", which takes a part out of the base'),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens cannot be merged here"),
        ({"peft_type": "IA3"}, "an adapter of type IA3; only LoRA"),
        ({"r": None}, "has no r, so the adapter is not whole"),
    ],
)
def test_an_adapter_that_would_be_merged_into_another_model_is_refused(pipeline, tmp_path, settings, says):
    folder = adapter_folder(noisy_policy(pipeline / "base"), tmp_path / "adapter", pipeline / "base", **settings)
    with pytest.raises(UserError) as refused:
        opened = open_checkpoint(folder, served=False)
        export_model(opened, tmp_path / "out", dtype="float32", adapter_only=False, metrics=[])
    assert says in str(refused.value) and not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        open_checkpoint(folder)


def test_an_adapter_of_another_shape_is_refused_before_vllm_fills_it_up(pipeline, tmp_path):
    policy = noisy_policy(pipeline / "base")
    open_checkpoint(adapter_folder(policy, tmp_path / "whole", pipeline / "base"))
    for number, (change, says) in enumerate(
        (
            (
                lambda name, t: (name, t[:, :-1] if "lora_A" in name else t),
                "is it the base that this adapter was trained on",
            ),
            (
                lambda name, t: (name, t[:-1] if "lora_B" in name else t),
                "is it the base that this adapter was trained on",
            ),
            (lambda name, t: (name.replace("layers.0", "layers.9"), t), "has no such weight"),
            (
                lambda name, t: (name.replace("lora_A.weight", "lora_embedding_A"), t),
                "cannot be served; merge it into its base with PEFT",
            ),
        )
    ):
        folder = tmp_path / f"wrong-{number}"
        shutil.copytree(tmp_path / "whole", folder)
        tensors = dict(change(name, t) for name, t in adapter_of(policy).items())
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=says):
            open_checkpoint(folder)


def test_an_adapter_of_a_run_stays_on_the_base_that_it_was_trained_on(pipeline, trained, tmp_path):
    checkpoint = sorted((trained / "checkpoints").iterdir())[-1]
    open_checkpoint(checkpoint)
    shutil.copytree(pipeline / "base", tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors[min(tensors)] += 0.1
    save_file(tensors, tmp_path / "other/model.safetensors", {"format": "pt"})
    done = run_command("export", "--model", checkpoint, "--base", tmp_path / "other", "--out", tmp_path / "out")
    assert done.returncode == 2 and "was trained on another model.safetensors than" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    for name, old, new in (
        ("config.json", '"vocab_size"', '"head_scale": 2, "vocab_size"'),
        ("tokenizer.json", '"added_tokens"', '"added_tokens" '),
    ):
        folder = tmp_path / f"other-{name}"
        shutil.copytree(pipeline / "base", folder)
        (folder / name).write_text((folder / name).read_text().replace(old, new, 1))
        with pytest.raises(UserError, match=f"was trained on another {name} than"):
            open_checkpoint(checkpoint, str(folder))
    with pytest.raises(UserError, match="is a whole checkpoint and no adapter over one; leave --base out"):
        open_checkpoint(pipeline / "base", str(tmp_path / "other"))
    with pytest.raises(UserError, match="is the folder of a run; name its model, .*checkpoints/step-.* or .*model"):
        open_checkpoint(trained)


def test_an_adapter_over_four_bits_is_asked_over_four_bits(pipeline, tmp_path):
    """As it was trained, as it sampled, and as it is exported."""
    run = tmp_path / "run"
    folder = adapter_folder(noisy_policy(pipeline / "base", quantize="nf4"), tmp_path / "adapter", pipeline / "base")
    (run / "checkpoints").mkdir(parents=True)
    shutil.move(folder, run / "checkpoints/step-000001")
    record = {"settings": {"quantize": "nf4", "dtype": "float32"}}
    (run / "config.json").write_text(json.dumps(record))
    opened = open_checkpoint(run / "checkpoints/step-000001")
    served = load_file(f"{served_base(opened)}/model.safetensors")
    rounded = through_nf4(load_file(pipeline / "base/model.safetensors")["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(served["model.layers.0.mlp.up_proj.weight"], rounded)
    (tmp_path / "link").symlink_to(run / "checkpoints/step-000001")
    assert served_base(open_checkpoint(tmp_path / "link")) == served_base(opened), (
        "its run is found through a link, too"
    )
    (run / "config.json").write_text(json.dumps({"settings": {"quantize": "none", "dtype": "float32"}}))
    assert served_base(opened) == str(pipeline / "base")


@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_quantised_weights_are_not_cast_into_nonsense(pipeline, tmp_path, method):
    base = tmp_path / "base"
    shutil.copytree(pipeline / "base", base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": method}}))
    done = run_command("export", "--model", base, "--out", tmp_path / "x")
    assert (
        done.returncode == 2
        and f"its weights are quantised (quantization_config in config.json: {method})" in done.stderr
    )
    assert not (tmp_path / "x").exists()


def test_a_card_says_how_the_model_was_asked():
    """Where that is not what the tokenizer's template alone gives: another server would ask otherwise, unseen."""
    notes = ["the chat template reasons with enable_thinking=True, so that is set"]
    opened = SimpleNamespace(chat=SimpleNamespace(notes=notes, shows_date=lambda: True))
    assert how_asked(opened, "2026-02-03")[-2:] == [
        f"- {notes[0]}",
        "- the chat template shows the date, which was 2026-02-03 in training",
    ]
    assert how_asked(opened, "")[-1] == f"- {notes[0]}"
    notes.clear()
    assert how_asked(opened, "") == []


def test_a_card_holds_no_command_of_notify_and_a_table_that_holds_a_bar():
    (line,) = [row for row in recipe_lines({"notify": "curl SECRET", "reward": "a|b"}, None) if "reward" in row]
    assert line == "| reward | a\\|b |" and "SECRET" not in "".join(recipe_lines({"notify": "curl SECRET"}, None))
