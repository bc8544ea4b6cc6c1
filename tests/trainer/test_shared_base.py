"""--base shared: the trainer's frozen weights are views into the sampler's; the bytes are proven, and a write is caught."""

import json
from types import SimpleNamespace
from unittest.mock import call, create_autospec

import pytest
import torch
from safetensors.torch import save_file

from data.errors import RunError, UserError
from rollout.vllm_versions import discard_kv_cache
from tests.helpers.commands import ROOT, SMALL_GRPO, run_command, succeed
from trainer.model.shared import NotSharedError, SharedBase, prove, sums_of, views_of

PACKS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SCRIPT = ROOT / "tests/helpers/shared_base.py"


def held() -> dict[str, torch.Tensor]:
    """As vLLM holds a layer with 3 rows of q, 2 of k and 2 of v, and an embedding of 5 tokens, padded to 8."""
    return {
        "embed.weight": torch.arange(16.0).view(8, 2),
        "attn.qkv_proj.weight": torch.arange(100.0, 114.0).view(7, 2),
        "attn.qkv_proj.bias": torch.arange(200.0, 207.0),
        "norm.weight": torch.tensor([1.0, -0.0]),
    }


def wanted(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = {"q": 3, "k": 2, "v": 2}
    of_parts = {f"attn.{part}_proj.weight": torch.empty(n, 2, device="meta") for part, n in rows.items()}
    biases = {f"attn.{part}_proj.bias": torch.empty(n, device="meta") for part, n in rows.items()}
    whole = {"embed.weight": torch.empty(5, 2, device="meta"), "norm.weight": torch.empty(2, device="meta")}
    return {**whole, **of_parts, **biases, **more}


def test_views_are_the_rows_that_vllm_packs():
    there = held()
    views = views_of(wanted(), there, PACKS)
    assert views["attn.q_proj.weight"].tolist() == [[100, 101], [102, 103], [104, 105]]
    assert views["attn.k_proj.weight"].tolist() == [[106, 107], [108, 109]]
    assert views["attn.v_proj.weight"].tolist() == [[110, 111], [112, 113]]
    assert views["attn.k_proj.bias"].tolist() == [203, 204] and views["attn.v_proj.bias"].tolist() == [205, 206]
    assert views["embed.weight"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    there["attn.qkv_proj.weight"][3, 1] = -1
    assert views["attn.k_proj.weight"].tolist() == [[106, -1], [108, 109]]


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("mlp.fc.weight", torch.empty(2, 2), "vLLM has no tensor for mlp.fc.weight"),
        ("norm.weight", torch.empty(3), "vLLM holds norm.weight as (2,) torch.float32, where the trainer needs (3,)"),
        ("embed.weight", torch.empty(5, 2, dtype=torch.bfloat16), "vLLM holds embed.weight as (8, 2) torch.float32"),
    ],
)
def test_what_vllm_holds_otherwise_is_named(name, tensor, says):
    with pytest.raises(NotSharedError) as refused:
        views_of(wanted(**{name: tensor}), held(), PACKS)
    assert says in str(refused.value)


def test_every_byte_is_compared_with_the_checkpoint(tmp_path):
    """Also the sign of a zero, which == does not see; the files may hold other tensors, and another dtype."""
    views = views_of(wanted(), held(), PACKS)
    stored = {name: view.clone() for name, view in views.items()}
    save_file({**stored, "rotary.inv_freq": torch.ones(3)}, tmp_path / "model.safetensors")
    prove(views, tmp_path)
    save_file({**stored, "norm.weight": torch.tensor([1.0, 0.0])}, tmp_path / "model.safetensors")
    with pytest.raises(NotSharedError, match=r"vLLM's norm\.weight is not what the checkpoint holds"):
        prove(views, tmp_path)
    save_file({name: view for name, view in stored.items() if "bias" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(NotSharedError, match=r"the checkpoint's files name no tensor attn\.k_proj\.bias"):
        prove(views, tmp_path)
    # a checkpoint in float32 under --dtype bfloat16: rounded as vLLM rounds, 1.00390625 lies half way and goes to even
    exact = {"norm.weight": torch.tensor([1.00390625, 3.14159274])}
    save_file(exact, tmp_path / "model.safetensors")
    prove({"norm.weight": torch.tensor([1.0, 3.140625], dtype=torch.bfloat16)}, tmp_path)
    with pytest.raises(NotSharedError):
        prove({"norm.weight": torch.tensor([1.0078125, 3.140625], dtype=torch.bfloat16)}, tmp_path)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.fc = torch.nn.Linear(2, 3, bias=False)

    def tie_weights(self) -> None:
        pass


def shared_layer(tmp_path, values: list[list[float]]) -> tuple[Layer, SharedBase]:
    weight = torch.tensor(values)
    save_file({"fc.weight": weight.clone()}, tmp_path / "model.safetensors")
    layer, base = Layer(), SharedBase({"fc.weight": weight}, {})
    base.put_into(layer, str(tmp_path))
    return layer, base


VALUES = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def times_one(layer: Layer, base: SharedBase) -> None:
    with torch.no_grad():
        layer.fc.weight.mul_(1.0)  # no value changes, but it was written to


def past_autograd(layer: Layer, base: SharedBase) -> None:
    layer.fc.weight.data[1, 0] += 2**-20


def by_the_sampler(layer: Layer, base: SharedBase) -> None:
    """The same words in another order, as where a kernel lays a matrix out anew."""
    base.held["fc.weight"].data.copy_(base.held["fc.weight"].data.flip(0).clone())


@pytest.mark.parametrize("write", [times_one, past_autograd, by_the_sampler])
def test_a_write_is_caught(tmp_path, write):
    layer, base = shared_layer(tmp_path, VALUES)
    assert layer.fc.weight.data_ptr() == base.held["fc.weight"].data_ptr() and not layer.fc.weight.requires_grad
    layer.fc(torch.ones(1, 2))
    base.refuse_writes()
    write(layer, base)
    with pytest.raises(RunError, match=r"--base shared: the frozen weight fc\.weight, .* --resume --base copies"):
        base.refuse_writes()


def test_a_write_between_forward_and_backward_is_autograds_error(tmp_path):
    layer, _ = shared_layer(tmp_path, VALUES)
    loss = layer.fc(torch.ones(1, 2, requires_grad=True)).sum()
    with torch.no_grad():
        layer.fc.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the weight fc\.weight holds a value that is no finite number"):
        shared_layer(tmp_path, [[1.0, float("nan")], [3.0, 4.0], [5.0, 6.0]])


@pytest.mark.vllm
@pytest.mark.slow(7)
def test_only_the_kv_cache_is_discarded(monkeypatch):
    """In versions of vLLM that can discard a tag, and in those that cannot."""
    said = []
    discard_kv_cache(SimpleNamespace(discard=said.append))
    assert said == [("kv_cache",)]
    from vllm.device_allocator import cumem

    gone = []
    monkeypatch.setattr(cumem, "unmap_and_release", gone.append)
    tags = ["weights", "kv_cache", "default", "kv_cache"]
    pieces = {place: SimpleNamespace(tag=tag, handle=f"handle {place}") for place, tag in enumerate(tags)}
    discard_kv_cache(SimpleNamespace(pointer_to_data=pieces))
    assert gone == ["handle 1", "handle 3"]


@pytest.mark.vllm
def test_the_worker_restores_it():
    """The worker, not its allocator: the runner keeps addresses in that memory, which it must write anew."""
    from vllm.v1.worker.gpu_worker import Worker

    from rollout.vllm_engine import VLLMEngine

    worker, engine = create_autospec(Worker, instance=True), object.__new__(VLLMEngine)
    engine.asleep = engine.shares_weights = True
    engine.llm = SimpleNamespace(collective_rpc=lambda method: [method(worker)])
    engine.wake()
    assert worker.mock_calls == [call.wake_up(["kv_cache"])] and not engine.asleep


def test_the_sum_of_words_sees_a_change_wherever_a_tensor_lies():
    whole = torch.arange(101, dtype=torch.int16)
    for view in (whole[:100], whole[1:101], whole[:99], whole.view(torch.int8)[:7]):
        before = sums_of({"x": view})[0]
        view[-1] ^= 1
        assert sums_of({"x": view})[0] != before


def options(pipeline, out, *more) -> tuple:
    """With a reward that differs within a group, so that the adapter learns."""
    puzzles, reward = pipeline / "puzzles/train.parquet", out.parent / "letters.py"
    reward.write_text("def fn(completion, puzzle):\n    return float(len(set(completion)) % 5)\n")
    more = (*more, "--reward", f"{reward}:fn")
    return ("--model", pipeline / "base", "--puzzles", puzzles, "--out", out, *SMALL_GRPO, "--dtype", "float32", *more)


@pytest.mark.vllm
@pytest.mark.slow(60)
@pytest.mark.timeout(3600)
def test_one_copy_gives_the_bytes_of_two_also_when_resumed(pipeline, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    kernel = ("--base", "copies", "--sampler-lora", "kernel", "--save-steps", "2")
    text = succeed(SCRIPT, "plain", "grpo", *options(pipeline, two, *kernel, "--steps", 2))
    assert "frozen base in memory: two copies, the trainer's and the sampler's: --base copies" in text
    kernel = ("--base", "shared", "--sampler-lora", "kernel", "--save-steps", "2")
    text = succeed(SCRIPT, "shared", "grpo", *options(pipeline, one, *kernel, "--steps", 1))
    assert "frozen base in memory: one copy, which the sampler reads too" in text
    found = json.loads(next(line for line in text.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))
    # 2 layers of 12 tensors (q, k and v have biases), the embedding that is the head too, and the last norm
    yes = {"all_in_vllm": True, "vllm_has_no_other": True, "q_is_the_first_rows": True}
    assert found == {"frozen": 26, **yes, "compared_with_its_class": 1}
    succeed("grpo", *options(pipeline, one, *kernel, "--steps", 2, "--resume"))
    files = ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step-000002/adapter_model.safetensors")
    assert json.loads((one / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"] > 0
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    text = succeed("replay", one / "steps/step-000002")
    assert "gradient_hash" in text and "DIFFERS" not in text
    # ---- a model whose weights vLLM turns out to hold in another way: two copies after all
    other = tmp_path / "other"
    kernel = ("--base", "auto", "--sampler-lora", "kernel")
    text = succeed(SCRIPT, "not_shared", "grpo", *options(pipeline, other, *kernel, "--steps", 2))
    assert "two copies, the trainer's and the sampler's: vLLM holds its layers in another way" in text
    for file in files[1:]:
        assert (other / file).read_bytes() == (two / file).read_bytes(), file


@pytest.mark.vllm
@pytest.mark.slow(20)
def test_ppo_stops_at_a_write_to_the_base_that_its_critic_reads_too(pipeline, tmp_path):
    more = ("--base", "shared", "--steps", 2)
    done = run_command(SCRIPT, "written", "ppo", *options(pipeline, tmp_path / "out", *more))
    assert done.returncode == 1, done.stderr[-3000:]
    named = (
        "--base shared: the frozen weight model.layers.1.self_attn.k_proj.weight, which trainer and sampler read, was"
    )
    assert named in done.stderr and "Traceback" not in done.stderr


def test_merging_into_a_shared_base_is_refused_by_name(pipeline, tmp_path):
    more = ("--base", "shared", "--sampler-lora", "merged")
    done = run_command("grpo", *options(pipeline, tmp_path / "out", *more))
    said = "--base shared: --sampler-lora merged writes the adapter into the sampler's weights; leave that out"
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()
