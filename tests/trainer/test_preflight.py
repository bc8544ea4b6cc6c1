"""What is checked before a model is loaded, the memory estimate against what autograd keeps, and the paper's recipe."""

import dataclasses
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.files import sealed
from data.puzzles import Puzzle
from launch.options import read_recipe
from tests.helpers.commands import ROOT, run_command, succeed
from trainer.config import GrpoConfig
from trainer.model.loading import empty_model
from trainer.model.shared import why_two_copies
from trainer.packing import pack
from trainer.policy import Policy
from trainer.ppo.settings import PpoConfig
from trainer.start.memory import (
    GAPS,
    activation_bytes,
    autocast_bytes,
    beside_sampler,
    estimate_memory,
    layer_bytes_per_token,
    rank_memory,
    sampler_memory,
    score_bytes,
    trained_bytes,
    training_memory,
)
from trainer.start.parts import answer_is_offered
from trainer.start.preflight import GIB, Launch, check_launch

SHAPE = ROOT / "launch/recipes/qwen2.5-7b"


def launch(nodes: int = 2, ranks: int = 8, gib: float = 40) -> Launch:
    return Launch(nodes=nodes, ranks_per_node=ranks, rank_bytes=gib * GIB, device="cuda")


def paper(**more) -> GrpoConfig:
    config = GrpoConfig(**read_recipe(GrpoConfig, "paper"))
    return dataclasses.replace(config, **{"model": str(SHAPE), **more})


def problems(rows) -> list[str]:
    return [row.problem for row in rows if row.problem]


def test_the_paper_recipe_holds_b3_and_fits_its_machine():
    config = paper()
    assert (config.prompts_per_step, config.group_size, config.lr, config.beta, config.temperature) == (
        64,
        5,
        1e-6,
        0.001,
        1,
    )
    assert (config.max_prompt_tokens, config.max_response_tokens, config.lora_rank, config.tensor_parallel) == (
        3072,
        3000,
        256,
        2,
    )
    assert not problems(check_launch(config, launch()) + estimate_memory(config, launch()))
    for too_much in (
        estimate_memory(config, launch(gib=10)),
        estimate_memory(paper(shard="none", checkpointing=False), launch()),
    ):
        assert any("a rank needs more memory" in problem for problem in problems(too_much))


def test_weights_and_adapter_are_exact():
    values = {row.what.strip(): row.value for row in estimate_memory(paper(shard="none"), launch())}
    weights = 7_615_616_512  # Qwen2.5-7B's parameters
    adapter = 256 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert values["weights"] == f"{2 * weights / GIB:.2f} GiB"
    assert values["adapter"] == values["gradients"] == f"{4 * adapter / GIB:.2f} GiB"
    assert values["AdamW moments"] == f"{8 * adapter / GIB:.2f} GiB"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"prompts_per_step": 40},
            "--prompts-per-step 40: must be a multiple of ranks that train x --updates-per-batch (16 x 1)",
        ),
        ({"tensor_parallel": 3}, "--tensor-parallel 3: must divide the 16 ranks"),
        ({"tensor_parallel": 8}, "--tensor-parallel 8: must divide the model's 28 attention heads"),
        (
            {"placement": "split", "sampler_ranks": 16},
            "--sampler-ranks 16: the launch has 16 ranks, and at least one must train",
        ),
        ({"max_response_tokens": 30_000}, "more than the model's 32768 positions"),
        (
            {"lora_rank": 1024},
            "an adapter of rank 1024: vLLM serves up to 512; train with a smaller --lora-rank, or merge it",
        ),
    ],
)
def test_what_does_not_fit_is_named(more, says):
    assert any(says in problem for problem in problems(check_launch(paper(**more), launch())))


def test_two_copies_that_do_not_fit_are_told_of_the_one_that_does():
    settings = {**read_recipe(GrpoConfig, "one_gpu_24gb"), "model": str(SHAPE)}
    machine = launch(nodes=1, ranks=1, gib=22.5)
    assert not problems(estimate_memory(GrpoConfig(**settings), machine))
    (said,) = problems(estimate_memory(GrpoConfig(**settings, base="copies"), machine))
    assert "--base auto would fit" in said
    (said,) = problems(estimate_memory(GrpoConfig(**settings, quantize="nf4"), machine))
    assert "--quantize none would fit" in said


def test_ppo_that_does_not_fit_is_a_note_and_no_refusal_of_what_nobody_gave():
    """Its critic cannot be sharded, so --shard fsdp is no remedy."""
    config = PpoConfig(model=str(SHAPE), dtype="bfloat16")
    found = problems(estimate_memory(config, launch(nodes=1, ranks=2, gib=6)))
    assert any("take a smaller model" in problem for problem in found), found


def test_key_value_heads_that_are_null_are_as_many_as_heads(tmp_path):
    shutil.copytree(SHAPE, tmp_path / "m")
    settings = json.loads((tmp_path / "m/config.json").read_text()) | {"num_key_value_heads": None}
    (tmp_path / "m/config.json").write_text(json.dumps(settings))
    assert not problems(check_launch(paper(model=str(tmp_path / "m")), launch()))


@pytest.mark.parametrize(
    ("more", "refused"),
    [({}, True), ({"sampler_dtype": "bfloat16"}, False), ({"lora_rank": 0}, False), ({"engine": "torch"}, False)],
)
def test_adapters_in_float32_on_a_gpu_are_refused_before_vllm_is_started(more, refused):
    """vLLM's kernels assert 16 bits, inside its start; the sentence there would blame the model."""
    config = GrpoConfig(**{"model": str(SHAPE), "dtype": "float32", "lora_rank": 8, **more})
    said = [row.problem for row in check_launch(config, launch(1, 1, 140)) if row.what == "LoRA"]
    assert [
        problem.startswith("--dtype float32: on a GPU vLLM computes adapters in 16 bits only") for problem in said
    ] == [refused]


def test_four_bits_and_eight_bit_moments_are_counted():
    """6.53 G weights of linear layers at 4.5 bits, 1.09 G of embedding, head and norms at 16; 0.65 G of adapter, two moments."""
    values = {
        row.what.strip(): row.value
        for row in estimate_memory(paper(shard="none", quantize="nf4", optimizer="adamw8bit"), launch())
    }
    assert values["weights"] == "5.45 GiB" and values["AdamW moments"] == "1.20 GiB"


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    ("rank", "dtype", "checkpointing", "autocast"),
    [
        *(
            (rank, *how, False)
            for rank in (8, 0)
            for how in (("float32", False), ("float32", True), ("bfloat16", False))
        ),
        (8, "float32", False, True),
    ],
)
def test_the_activation_estimate_is_what_autograd_keeps(pipeline, rank, dtype, checkpointing, autocast):
    config = GrpoConfig(lora_rank=rank, dtype=dtype, checkpointing=checkpointing, autocast=autocast)
    policy = Policy(
        str(pipeline / "base"),
        lora_rank=rank,
        lora_alpha=8,
        seed=0,
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
        checkpointing=checkpointing,
        autocast=autocast,
    )
    batch = pack([(list(range(5, 405)), [list(range(5, 405)), list(range(7, 407))])])
    estimate = estimate_when_backward_begins(config, policy, 1200)
    assert estimate == pytest.approx(kept_by_autograd(policy, batch), rel=0.15)


@pytest.mark.slow(3)
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma", "gemma2", "gemma3_text", "glm4"])
def test_the_activation_estimate_holds_for_other_families(tmp_path, family):
    """Whose layers have more norms, and whose attention may make its scores."""
    torch.manual_seed(0)
    shape = AutoConfig.for_model(family, **SMALL_SHAPE)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path)
    lengths = {"max_prompt_tokens": 200, "max_response_tokens": 200}
    config = GrpoConfig(lora_rank=8, dtype="bfloat16", **lengths)
    policy = Policy(
        str(tmp_path),
        lora_rank=8,
        lora_alpha=8,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        chat=SimpleNamespace(tokenizer=None),
    )
    batch = pack([(list(range(5, 205)), [list(range(5, 205))]) for _ in range(3)])
    estimate = estimate_when_backward_begins(config, policy, 1200)
    scores = score_bytes(config, shape, 1200, on_gpu=False)
    assert bool(scores) == (family == "gemma2")
    if scores:  # 4 heads: a token's scores with the 400 places of its row; 10 bytes of gradients in one layer
        estimate += scores - 10 * 4 * 1200 * 400
    assert estimate == pytest.approx(kept_by_autograd(policy, batch), rel=0.15)


SMALL_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def kept_by_autograd(policy: Policy, batch) -> int:
    """Bytes that the graph of a batch's log-probs holds, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert policy.response_logprobs(batch).sum().requires_grad
    return sum(kept.values())


def estimate_when_backward_begins(config: GrpoConfig, policy: Policy, tokens: int) -> float:
    base = policy.causal_lm
    size, h, i = getattr(torch, config.dtype).itemsize, base.config.hidden_size, base.config.intermediate_size
    estimate = activation_bytes(config, base, tokens, False)
    estimate += autocast_bytes(config, trained_bytes(config, base), base)
    estimate -= tokens * size * (3 * i + 2 * h)  # gradients of the backward pass, which has not begun
    if config.checkpointing:  # the layer that is computed again is not alive yet
        estimate -= tokens * layer_bytes_per_token(config, base, size, False)
    return estimate


# The 7B shape on one H200, r = 256, bfloat16, 2 prompts x 5 responses of the paper's lengths, one optimizer step: peak of
# torch.cuda.max_memory_allocated() in bytes (tests/bench/README.md, "On a GPU"); there was no sampler and no hand-over.
MEASURED = [({}, 62.7e9), ({"checkpointing": True}, 29.1e9), ({"checkpointing": True, "keep_attention": True}, 30.6e9)]
# In that version layers with an adapter kept their inputs: in each of 28 layers two norms of 3,584 and the product of 18,944.
NOT_KEPT_SINCE = 7730 * 28 * 2 * (2 * 3584 + 18944)


@pytest.mark.parametrize(("settings", "measured"), MEASURED)
def test_the_table_is_right_for_a_step_on_a_gpu(settings, measured):
    config = GrpoConfig(
        **{"model": str(SHAPE), "dtype": "bfloat16", "prompts_per_step": 2, "group_size": 5, **settings},
        micro_tokens=8192,
        max_prompt_tokens=2000,
        max_response_tokens=1146,
    )
    base = empty_model(str(SHAPE), torch.bfloat16, "sdpa")
    memory = training_memory(config, launch(nodes=1, ranks=1, gib=140), base)
    found = memory.peak - memory.kept["copy to hand over"] - memory.kept["sampler's adapter"]
    measured -= 0 if config.checkpointing else NOT_KEPT_SINCE
    assert found == pytest.approx(measured, rel=0.07)  # above: the rows had 7,730 tokens, and might have 8,192
    # nothing is made again where PEFT's own layers compute
    nf4 = training_memory(dataclasses.replace(config, quantize="nf4"), launch(nodes=1, ranks=1, gib=140), base)
    more = NOT_KEPT_SINCE if not config.checkpointing else NOT_KEPT_SINCE / 28
    assert nf4.backward["activations"] - memory.backward["activations"] > 0.9 * more


def test_the_table_is_right_for_a_run_on_a_gpu():
    """94 GB at most, in a version that kept the trainer's freed blocks while vLLM was awake: so both add up."""
    more = {"prompts_per_step": 8, "checkpointing": True, "memory_fraction": 0.4, "max_response_tokens": 1024}
    config = GrpoConfig(model=str(SHAPE), dtype="bfloat16", group_size=5, **more)
    h200 = launch(nodes=1, ranks=1, gib=139.8)
    base = empty_model(str(SHAPE), torch.bfloat16, "sdpa")
    sampler = sampler_memory(config, h200, base)
    assert sampler.total == pytest.approx(0.4 * h200.rank_bytes)
    values = {row.what: row.value for row in estimate_memory(config, h200)}
    training = float(values["while training"].split()[0]) * GIB
    assert training + sampler.total == pytest.approx(94e9, rel=0.15)


def test_the_table_counts_ppos_critic_and_cuts_a_batch_into_minibatches():
    shape = {"model": str(SHAPE), "dtype": "bfloat16", "prompts_per_step": 8}
    base = empty_model(str(SHAPE), torch.bfloat16, "sdpa")

    def memory(**more):
        return training_memory(PpoConfig(**shape, **more), launch(nodes=1, ranks=1, gib=140), base)

    grpo = training_memory(GrpoConfig(**shape, group_size=2), launch(nodes=1, ranks=1, gib=140), base)
    ppo = memory(group_size=2)
    adapter = ppo.kept["adapter"]  # float32: weights, gradients and two moments
    assert grpo.kept["critic"] == 0 and ppo.kept["critic"] == 3 * adapter > 0
    assert grpo.kept["critic's gradients"] == 0 and ppo.kept["critic's gradients"] == adapter
    assert ppo.kept_while_sampling - grpo.kept_while_sampling == pytest.approx(3 * adapter)
    assert ppo.peak - grpo.peak == pytest.approx(4 * adapter)
    assert memory(critic="c").kept["critic"] == ppo.kept["weights"] + 3 * adapter
    # a pass more changes no micro-batch; more minibatches make them shorter
    few = {"micro_tokens": 10**6, "max_prompt_tokens": 1000, "max_response_tokens": 500}
    whole, passes, parts = memory(**few), memory(**few, epochs=4), memory(**few, minibatches=4)
    assert whole.backward == passes.backward
    assert whole.backward["activations"] > 3 * parts.backward["activations"]


@pytest.mark.parametrize(("recipe", "gib"), [("one_gpu_80gb", 79), ("one_gpu_24gb", 22.5)])
def test_the_recipes_for_one_gpu_fit_and_their_headers_say_what_the_dry_run_says(recipe, gib):
    """79 GiB: an H100 or A100 of 80 GB as its driver reports it; 22.5: an A10 or L4 of 24 GB."""
    header = (ROOT / f"launch/recipes/{recipe}.yaml").read_text()
    for size in ("7b", "3b", "1.5b"):
        shape = f"launch/recipes/qwen2.5-{size}"
        config = GrpoConfig(**{**read_recipe(GrpoConfig, recipe), "model": str(ROOT / shape)})
        machine = launch(nodes=1, ranks=1, gib=gib)
        rows = check_launch(config, machine) + estimate_memory(config, machine)
        assert not problems(rows)
        values = {row.what: row.value for row in rows}
        training, sampling = (float(values[f"while {what}"].split()[0]) for what in ("training", "sampling"))
        responses = float(values["sampler"].rpartition("for ")[2].split()[0])
        assert f"#             qwen2.5-{size:<8}  {training:8.1f}  {sampling:8.1f}  {responses:9.1f}\n" in header


@pytest.mark.parametrize(("eager", "gib"), [(True, 20.8), (False, 22.1)])
def test_the_table_is_right_for_a_card_of_24_gb(eager, gib):
    """gib: what the driver said that the process used while it sampled (tests/bench/README.md)."""
    settings = {**read_recipe(GrpoConfig, "one_gpu_24gb"), "model": str(SHAPE), "prompts_per_step": 4, "eager": eager}
    values = {
        row.what: row.value for row in estimate_memory(GrpoConfig(**settings), launch(nodes=1, ranks=1, gib=22.5))
    }
    assert float(values["while sampling"].split()[0]) == pytest.approx(gib, rel=0.05)


def test_longer_responses_on_24_gb_as_the_recipe_says():
    (line,) = re.findall(r"# Longer: .*?with (--.*?);", (ROOT / "launch/recipes/one_gpu_24gb.yaml").read_text())
    assert line == "--quantize nf4 --max-response-tokens 2048 --memory-fraction 0.69 --eager"
    settings = {
        **read_recipe(GrpoConfig, "one_gpu_24gb"),
        "model": str(SHAPE),
        "quantize": "nf4",
        "memory_fraction": 0.69,
    }
    card = launch(nodes=1, ranks=1, gib=22.5)
    for eager in (True, False):
        config = GrpoConfig(**settings | {"max_response_tokens": 2048, "eager": eager})
        assert bool(problems(estimate_memory(config, card))) != eager


def test_a_shared_base_is_counted_once():
    """The 7B shape has 7,615,616,512 weights; in and out of a layer's 7 matrices are 2 x 7,168 + 2 x 4,096 + 3 x 22,528 wide."""
    settings = {**read_recipe(GrpoConfig, "one_gpu_24gb"), "model": str(SHAPE)}
    card = launch(nodes=1, ranks=1, gib=22.5)
    base = empty_model(str(SHAPE), torch.bfloat16, "sdpa")
    one = rank_memory(GrpoConfig(**settings), card, base)
    two = rank_memory(GrpoConfig(**settings, base="copies"), card, base)
    weights, slots = 2 * 7_615_616_512, 2 * 28 * 16 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    assert one.sampler == two.sampler and one.sampler.weights == weights + slots
    assert one.trainer.kept["sampler's adapter"] == slots and two.trainer.kept["sampler's adapter"] == 0
    assert one.trainer.kept["weights"] == two.trainer.kept["weights"] == weights
    # while it samples, the trainer's copy is gone, and so are its gaps; while it trains, vLLM's slots stay
    assert two.sampling - one.sampling == pytest.approx(weights * (1 + GAPS))
    assert one.training - two.training == pytest.approx(slots - GAPS * weights)
    rows = check_launch(GrpoConfig(**settings), card)
    assert "one copy" in next(row.value for row in rows if row.what == "frozen base")
    assert not problems(estimate_memory(GrpoConfig(**settings), card))
    # a card of 24 GB does not hold the sampler's and a second copy
    assert two.sampling > card.rank_bytes and problems(estimate_memory(GrpoConfig(**settings, base="copies"), card))


def test_one_and_a_half_billion_weights_fit_a_card_of_8_gb():
    shape = str(ROOT / "launch/recipes/qwen2.5-1.5b")
    config = GrpoConfig(**{**read_recipe(GrpoConfig, "one_gpu_24gb"), "model": shape, "memory_fraction": 0.6})
    rows = estimate_memory(config, launch(nodes=1, ranks=1, gib=7.6))
    values = {row.what: row.value for row in rows}
    assert not problems(rows)
    said = f"{float(values['while training'][:4]):.1f} GiB training, {float(values['while sampling'][:4]):.1f} sampling, of 7.6"
    assert said in (ROOT / "launch/recipes/one_gpu_24gb.yaml").read_text()


def test_the_dry_run_says_what_would_fit_and_it_does():
    """The 80 GB recipe with a small adapter, on 24 GB: prompts of 3,072 and responses of 3,000 tokens."""
    card = launch(nodes=1, ranks=1, gib=22.5)
    settings = {**read_recipe(GrpoConfig, "one_gpu_80gb"), "model": str(SHAPE), "lora_rank": 16, "memory_fraction": 0.6}
    (said,) = {problem.rpartition(": ")[2] for problem in problems(estimate_memory(GrpoConfig(**settings), card))}
    assert said == "--micro-tokens 6072 --memory-fraction 0.88 would fit"
    assert not problems(estimate_memory(GrpoConfig(**settings | {"memory_fraction": 0.88, "micro_tokens": 6072}), card))
    larger = GrpoConfig(**settings | {"memory_fraction": 0.89, "micro_tokens": 6072})
    assert problems(estimate_memory(larger, card)), "no more than a hundredth is left"
    (said,) = {p.rpartition(": ")[2] for p in problems(estimate_memory(GrpoConfig(**settings), launch(1, 1, 12)))}
    assert said.startswith("take a smaller model")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"engine": "torch"}, "--engine torch samples with the trainer's own model"),
        ({"placement": "split"}, "--placement split samples in other processes"),
        ({"tensor_parallel": 2}, "--tensor-parallel 2: a rank of vLLM holds only its part of every matrix"),
        ({"shard": "fsdp"}, "--shard fsdp: a rank of the trainer holds only its rows of every matrix"),
        ({"lora_rank": 0}, "--lora-rank 0 trains every weight, so none is frozen"),
        ({"quantize": "nf4"}, "--quantize nf4 holds the trainer's in 4 bits, and the sampler's in float32"),
        (
            {"quantize": "nf4", "sampler_dtype": "bfloat16"},
            "--quantize nf4 holds the trainer's in 4 bits, and the sampler's in bfloat16",
        ),
        ({"sampler_lora": "merged"}, "--sampler-lora merged writes the adapter into the sampler's weights"),
        (
            {"sampler_dtype": "bfloat16"},
            "the trainer's is in float32 (--dtype), and the sampler's in bfloat16 (--sampler-dtype)",
        ),
    ],
)
def test_where_a_base_cannot_be_shared_it_says_why_and_is_refused_if_asked_for(more, why):
    settings = {"model": str(SHAPE), "dtype": "float32", **more}
    for on_gpu in (True, False):
        assert why_two_copies(GrpoConfig(**settings), on_gpu) == why_two_copies(
            GrpoConfig(**settings, base="shared"), on_gpu
        )
        assert why_two_copies(GrpoConfig(**settings), on_gpu) == why
    rows = check_launch(GrpoConfig(**settings, base="shared"), launch())
    assert f"--base shared: {why}; leave that out, or use --base copies" in problems(rows)
    rows = check_launch(GrpoConfig(**settings), launch())
    assert not [row for row in rows if row.what == "frozen base" and row.problem]


def test_a_base_is_shared_by_default_on_a_gpu_only():
    config = GrpoConfig(model=str(SHAPE), dtype="float32")
    assert why_two_copies(config, on_gpu=True) == ""
    assert why_two_copies(config, on_gpu=False).startswith("on a CPU vLLM packs its own for speed")
    assert why_two_copies(dataclasses.replace(config, base="shared"), on_gpu=False) == ""
    assert why_two_copies(dataclasses.replace(config, base="copies"), on_gpu=True) == "--base copies"


@pytest.mark.slow(1)
def test_dry_run_prints_a_table_and_loads_nothing(pipeline, tmp_path):
    machine = ["--nodes", 2, "--ranks-per-node", 8, "--rank-gib", 40]
    text = succeed("grpo", "--recipe", "paper", "--dry-run", *machine, "--model", SHAPE)
    assert "2 nodes x 8 ranks on cuda; 16 train, 8 samplers of 2 (the same ranks)" in text
    assert "while training" in text and "PROBLEM" not in text
    done = run_command("grpo", "--recipe", "paper", "--dry-run", *machine, "--model", SHAPE, "--tensor-parallel", 5)
    assert done.returncode == 2 and "PROBLEM: --tensor-parallel 5: must divide the 16 ranks" in done.stdout
    done = run_command("grpo", "--recipe", "paper", "--dry-run", *machine)
    assert done.returncode == 2 and "name launch/recipes/qwen2.5-7b" in done.stderr and "Traceback" not in done.stderr
    here = succeed(
        "grpo",
        "--dry-run",
        "--model",
        pipeline / "base",
        "--max-prompt-tokens",
        400,
        "--max-response-tokens",
        64,
        "--lora-rank",
        8,
    )
    assert "1 nodes x 1 ranks on cpu" in here


def test_every_adapter_that_is_under_way_is_counted_under_split():
    """7B, r = 256: 645,922,816 numbers in float32. With --max-staleness 4 five are kept, and the sampler receives one."""
    base = empty_model(str(SHAPE), torch.bfloat16, "sdpa")
    split = {"placement": "split", "sampler_ranks": 8, "correction": "tis", "lora_rank": 256}
    one = 645_922_816 * 4
    for k in (0, 4):
        memory = training_memory(paper(**split, max_staleness=k), launch(gib=80), base)
        assert memory.kept["copy to hand over"] == one * (1 + k)
    machine = launch(gib=80)
    full = paper(**split, memory_fraction=0.965, tensor_parallel=1)
    rank = rank_memory(full, machine, base)
    room = machine.rank_bytes - rank.sampler.total
    assert room > beside_sampler(full), "without the adapter it would fit"
    assert room < beside_sampler(full) + one and not rank.fits(full, machine)


def test_attention_in_float32_on_a_gpu_holds_its_scores():
    """No kernel: four matrices of 28 heads x 4 x 3,000 responses' tokens x 3,072 of the prompt, in float32."""
    base = empty_model(str(SHAPE), torch.bfloat16, "sdpa")
    plain = paper(dtype="float32", micro_tokens=16_384, group_size=4)
    memory = training_memory(plain, launch(gib=80), base)
    assert memory.backward["attention scores"] == 4 * 4 * 28 * 12_000 * 3_072
    for other in (paper(), dataclasses.replace(plain, dtype="bfloat16")):
        assert training_memory(other, launch(gib=80), base).backward["attention scores"] == 0


def test_rows_without_shared_prompts_are_longer():
    """2 prompts x 4 responses: 2 x (2,000 + 4 x 1,000) tokens, or 8 x 3,000."""
    base = empty_model(str(SHAPE), torch.bfloat16, "sdpa")
    lengths = {"max_prompt_tokens": 2000, "max_response_tokens": 1000, "micro_tokens": 10**6}
    settings = {"model": str(SHAPE), "dtype": "float32", "prompts_per_step": 2, "group_size": 4, **lengths}
    shared, plain = (
        training_memory(GrpoConfig(**settings, packing=packing), launch(nodes=1, ranks=1), base)
        for packing in ("shared", "plain")
    )
    assert plain.backward["activations"] == 2 * shared.backward["activations"]
    base.config.sliding_window, base.config.use_sliding_window = 4096, True  # then prompts are not shared either
    windowed = training_memory(GrpoConfig(**settings), launch(nodes=1, ranks=1), base)
    assert windowed.backward["activations"] == plain.backward["activations"]
    assert windowed.backward["attention scores"] == 0 < plain.backward["attention scores"], (
        "its own attention has a kernel"
    )
    few = GrpoConfig(**settings | {"prompts_per_step": 1, "micro_tokens": 8_000})
    rows = [training_memory(few, launch(1, 1), base).one_row]
    base.config.use_sliding_window = False
    assert [*rows, training_memory(few, launch(1, 1), base).one_row] == [False, True]


def test_the_sampler_has_a_slot_of_one_of_vllms_sizes():
    """Rank 33 gets the slot of 64; an adapter that is added to the sampler's weights needs none."""
    base = empty_model(str(SHAPE), torch.bfloat16, "sdpa")

    def weights(**more):
        settings = {"model": str(SHAPE), "dtype": "float32", "sampler_dtype": "bfloat16", **more}
        return sampler_memory(GrpoConfig(**settings), launch(nodes=1, ranks=1), base).weights

    assert weights(lora_rank=33) == weights(lora_rank=64) > weights(lora_rank=32)
    slot = 2 * 64 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert weights(lora_rank=64) - weights(lora_rank=64, sampler_lora="merged") == slot


def test_a_shape_in_float32_can_be_looked_at_for_a_gpu():
    """Its adapter can only be added to the sampler's weights, and a shape has no files into which it would be."""
    card = launch(nodes=1, ranks=1, gib=79)
    settings = {"model": str(SHAPE), "dtype": "float32"}
    (problem,) = problems(check_launch(GrpoConfig(**settings), card))
    assert problem.startswith("--dtype float32: on a GPU") and "--sampler-lora merged" in problem
    assert not problems(check_launch(GrpoConfig(**settings, sampler_lora="merged"), card))
    (problem,) = problems(check_launch(GrpoConfig(**settings | {"dtype": "bfloat16"}, sampler_dtype="float32"), card))
    assert problem.startswith("--sampler-dtype float32: on a GPU") and "leave it out" in problem


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_hidden_layers": 0}, "config.json says num_hidden_layers 0, which must be a whole number of at least 1"),
        ({"num_attention_heads": 0}, "config.json says num_attention_heads 0"),
        ({"hidden_size": "big"}, "config.json says hidden_size 'big'"),
        ({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2}, "a gpt2 has no model.layers and lm_head"),
        ({"model_type": "mixtral", "num_local_experts": 8}, ": a mixture of experts (num_"),
    ],
)
def test_a_dry_run_of_a_shape_that_cannot_be_trained_says_why(tmp_path, settings, problem):
    model = tmp_path / "shape"
    model.mkdir()
    shape = json.loads((SHAPE / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**shape, "architectures": None, **settings}))
    machine = ["--recipe", "one_gpu_80gb", "--rank-gib", 79]
    done = run_command("grpo", "--dry-run", "--model", model, *machine)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and problem in said and "Traceback" not in said


def test_leaving_out_what_takes_memory_is_among_what_would_fit():
    """Activations of attention that are kept beside checkpointing."""
    settings = {**read_recipe(GrpoConfig, "one_gpu_24gb"), "model": str(SHAPE), "keep_attention": True}
    settings |= {"micro_tokens": 4096, "memory_fraction": 0.8}
    card = launch(nodes=1, ranks=1, gib=19)
    (said,) = {problem.rpartition(": ")[2] for problem in problems(estimate_memory(GrpoConfig(**settings), card))}
    assert said == "--no-keep-attention would fit"
    assert not problems(estimate_memory(GrpoConfig(**settings | {"keep_attention": False}), card))


def test_the_script_for_slurm_runs_on_both_ends_of_the_range():
    """torch 2.11's torchrun knows no --shutdown-timeout; Slurm gives a task one core unless it is told otherwise."""
    script = (ROOT / "launch/recipes/paper.sbatch").read_text()
    assert "--shutdown-timeout" not in script and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280" in script
    assert "#SBATCH --exclusive\n" in script and "#SBATCH --mem=0\n" in script


def test_a_job_that_slurm_starts_again_goes_on(tmp_path):
    """After a preemption, or the loss of a node, with the same words; a first start that made no run begins anew."""
    for program, does in (("srun", 'echo "$@"'), ("scontrol", "echo node1")):
        (tmp_path / program).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "x"}
    script = ["sh", ROOT / "launch/recipes/paper.sbatch", "--seed", "1"]

    def words(*given: str, **more: str) -> str:
        start = [*script, *given]
        return subprocess.run(start, cwd=tmp_path, env=env | more, capture_output=True, text=True, check=True).stdout

    assert words(SLURM_RESTART_COUNT="1").endswith(" sh --seed 1\n")
    (tmp_path / "runs/paper/grpo").mkdir(parents=True)
    (tmp_path / "runs/paper/grpo/config.json").touch()
    assert words().endswith(" sh --seed 1\n") and words(SLURM_RESTART_COUNT="1").endswith(" sh --resume --seed 1\n")
    for out in (["--out", "b"], ["--out=b"]):
        assert "--resume" not in words(*out, SLURM_RESTART_COUNT="1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").touch()
    for out in (["--out", "b"], ["--out=b"]):
        assert "--resume" in words(*out, SLURM_RESTART_COUNT="1")


def test_an_answer_that_its_candidates_do_not_offer_is_seen():
    """No response that follows the prompt is right: a typo, or another name of the type, in a file made by hand."""
    cells = [["A"], ["B"]]

    def offered(answer: list[str], candidates: list[str], n_cells: int = 2) -> bool:
        return answer_is_offered(
            Puzzle(id="p", context="", cells=cells[:n_cells], candidates=candidates, answer=answer)
        )

    assert offered(["T cell", "b cell "], ["B cell", "T cell"]) and offered(["T cell"], ["B cell", "T cell"], n_cells=1)
    assert not offered(["T cell", "NK cell"], ["B cell", "T cell"])
    assert not offered(["T cell", "T cell"], ["B cell", "T cell"])
    assert not offered(["NK cell"], ["B cell", "T cell"], n_cells=1) and offered(["NK cell"], [], n_cells=1)


def test_a_resumed_run_is_checked_with_the_dtype_that_its_sampler_had(tmp_path):
    """Its own dtype is recorded; what auto would be now is another."""
    began = GrpoConfig(model=str(SHAPE), puzzles="p", out=str(tmp_path), dtype="float32", sampler_dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(sealed({"settings": dataclasses.asdict(began), "data": {}})))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    again = dataclasses.replace(began, resume=True, sampler_dtype="auto")
    (said,) = problems(check_launch(dataclasses.replace(again, base="shared"), launch()))
    assert said.startswith("--base shared: the trainer's is in float32 (--dtype), and the sampler's in bfloat16 (")
    assert estimate_memory(again, launch()) == estimate_memory(began, launch())
    assert estimate_memory(again, launch()) != estimate_memory(dataclasses.replace(again, resume=False), launch())
