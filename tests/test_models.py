"""Models of other people: chat templates, tokenizers, ends of a turn, architectures. Right, or refused before step 1."""

import copy
import datetime
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mistral_common
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.errors import UserError
from data.prompts import RESPONSE_TAGS, ChatFormat, chat
from data.puzzles import read_puzzles, read_rows
from reward.cellpuzzles import batch_reward
from rollout import count_repeats
from rollout.torch_engine import TorchEngine
from rollout.vllm_versions import why_not_started
from tests.helpers.architectures import TYPES, make_checkpoint, trained_policy
from tests.helpers.commands import ROOT, SMALL_GRPO, run_command, succeed
from trainer.model.embedded import CHAT_TEMPLATE
from trainer.model.loading import load_tokenizer
from trainer.model.opening import open_checkpoint
from trainer.model.serving import refuse_other_positions
from trainer.policy import Policy
from trainer.sft.examples import encode_traces
from trainer.sft.loop import check_held_out
from trainer.sft.settings import SftConfig
from trainer.start.model_check import check_model
from trainer.start.parts import load_policy
from trainer.start.preflight import context_of, steady_positions, unread_scaling

DAY = datetime.date(2026, 2, 3)
HEADER = "<|im_start|>assistant\n"
OPENED = CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%")
NO_SYSTEM_ROLE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)
DROPS_SYSTEM = CHAT_TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)
SWITCHED = CHAT_TEMPLATE.replace(
    "assistant\n{%", "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{%"
)
DATED = "Today: {{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
TRIMS = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
GEMMA = (  # no system role, roles user and model, an end of turn that is not the tokenizer's EOS
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "ChatML": (CHAT_TEMPLATE, ""),
    "opens the reasoning": (OPENED, "<think>\n"),
    "opens it without a line break": (OPENED.replace("<think>\n", "<think>"), "<think>"),
    "no system role": (NO_SYSTEM_ROLE, ""),
    "drops the system message": (DROPS_SYSTEM, ""),
    "a thinking switch": (SWITCHED, ""),
    "a date": (DATED, ""),
    "trims messages": (TRIMS, ""),
    "Gemma's": (GEMMA, ""),
    "Mistral's": (MISTRAL, ""),
    "R1's": (MISTRAL.replace(" [/INST]", " [/INST]<think>\n"), "<think>\n"),
}
"""{name: (template, what it writes of the response)}"""


def metaspace_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2's and Gemma's: a space is ▁, one is put before every text, unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )


def tagged_tokenizer(base: Path) -> PreTrainedTokenizerFast:
    """The embedded tokenizer with the four tags as special tokens, as in some reasoning models."""
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_special_tokens({"additional_special_tokens": list(RESPONSE_TAGS)})
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(pipeline):
    texts = [row["user_msg"] + row["assistant_msg"] for row in read_rows(pipeline / "traces.jsonl")[:40]]
    return {
        "byte-level": load_tokenizer(str(pipeline / "base")),
        "special tags": tagged_tokenizer(pipeline / "base"),
        "metaspace": metaspace_tokenizer(texts),
    }


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    if tokenizer.bos_token is None:
        tokenizer.bos_token = "<|im_start|>"
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level", "special tags", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_holds_its_messages_and_an_answer_reads_back(pipeline, tokenizers, tmp_path, name, kind):
    template, opening = TEMPLATES[name]
    tokenizer = with_template(tokenizers[kind], template)
    asked = ChatFormat(tokenizer, tmp_path, DAY)  # no config.json there: the tokenizer alone
    puzzle = read_puzzles(pipeline / "puzzles/test.parquet")[0]
    text = asked.prompt_text(puzzle.chat())
    assert puzzle.system_message in text and puzzle.user_message.strip() in text
    assert asked.opening == opening and text.endswith(opening)
    # the tokens are those of the text: no second BOS, nothing after the header
    assert asked.prompt_ids(puzzle.chat()) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id is None or asked.prompt_ids(puzzle.chat())[1:2] != [tokenizer.bos_token_id]
    answer = f"<think>Cell 1 expresses CD3D , 'n't CD8A.</think>\n<answer>{' | '.join(puzzle.answer)}</answer>"
    ids = asked.response_ids(answer)
    assert ids[-1] == asked.turn_end and not set(ids[:-1]) & set(asked.stop_ids)
    read = asked.response_text(ids)
    assert read.replace("<think>\n", "<think>", 1).lstrip() == answer
    assert batch_reward(read, puzzle).total == 1.0
    assert asked.response_text(ids[:-1]) == read  # cut at the limit: no end of turn to take off
    if opening:  # the model itself says neither the tag nor the line break
        said = tokenizer.decode(ids[:-1], skip_special_tokens=False)
        assert said.lstrip().startswith("Cell 1") and "<think>" not in said


def test_the_template_ends_a_turn_not_the_tokenizer(tokenizers, tmp_path):
    """Gemma: EOS is </s>, and the turn ends at <end_of_turn>. Both end a response; the cold start teaches the template's."""
    tokenizer = with_template(tokenizers["metaspace"], GEMMA)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    asked = ChatFormat(tokenizer, tmp_path)
    assert asked.turn_end == end and set(asked.stop_ids) == {2, 5, end}
    assert asked.ends == {
        end: ["chat template"],
        2: ["tokenizer", "generation_config.json"],
        5: ["generation_config.json"],
    }


def test_notes_say_what_is_unusual_and_the_date_is_the_runs(tokenizers, tmp_path):
    tokenizer = tokenizers["byte-level"]
    notes = {
        name: ChatFormat(with_template(tokenizer, template), tmp_path).notes
        for name, (template, _) in TEMPLATES.items()
    }
    assert notes["ChatML"] == notes["a date"] == notes["trims messages"] == []
    assert notes["opens the reasoning"] == [
        "the chat template ends the prompt in '<think>\\n', so the text of every response begins with it"
    ]
    assert notes["no system role"] == [
        "the chat template raises 'System role not supported', so the system message stands at the head of the user message"
    ]
    assert notes["drops the system message"][0].startswith("the chat template changes or drops the system message, so ")
    assert notes["a thinking switch"] == ["the chat template reasons with enable_thinking=True, so that is set"]
    dated = ChatFormat(with_template(tokenizer, DATED), tmp_path, DAY)
    one, same = (dated.prompt_ids([{"role": "user", "content": "T cell"}]) for _ in range(2))
    assert max(one) > 256 and all(a is b for a, b in zip(one, same, strict=True))  # 100,000 prompts: 2 GB and not 11
    assert dated.prompt_text([{"role": "user", "content": "x"}]).startswith("Today: 03 Feb 2026\n")
    assert dated.shows_date() and not ChatFormat(with_template(tokenizer, CHAT_TEMPLATE), tmp_path, DAY).shows_date()


ADDED = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant", "Answer only in the words of the list, and never say who you are. <|im_start|>assistant"
)
ODD = {  # template, what the prompt then ends in, the beginning of its note
    "SmolLM3 cuts </think> out of the system message": (
        CHAT_TEMPLATE.replace(
            "{{ message['content'] }}",
            "{{ message['content'].replace('/think', '') if message['role'] == 'system' else message['content'] }}",
        ),
        HEADER,
        "the chat template changes or drops the system message, so the system message stands at the head",
    ),
    "messages are lists of parts": (
        CHAT_TEMPLATE.replace(
            "{{ message['content'] }}", "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
        ),
        HEADER,
        "",
    ),
    "no generation prompt": (
        CHAT_TEMPLATE.split("{% if add")[0],
        HEADER,
        "the chat template ends before the assistant's turn, so '<|im_start|>assistant\\n' is put after it",
    ),
    "the model's first words": (
        OPENED.replace("<think>\n", "<think>\nOkay, "),
        HEADER + "<think>\nOkay, ",
        "the chat template ends the prompt in '<think>\\nOkay, ', so the text of every response begins with it",
    ),
    "no answers": (
        OPENED.replace(
            "{% for", "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('ask!') }}{% endif %}{% for", 1
        ),
        HEADER + "<think>\n",
        "the chat template ends the prompt in '<think>\\n'",
    ),
    "the user twice": (
        CHAT_TEMPLATE.replace("{% for", "{{ messages[-1]['content'] }}{% for", 1),
        HEADER,
        "the chat template writes the user message 2 times",
    ),
    "words of its own": (ADDED, HEADER, "the chat template adds words of its own to every prompt: "),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_template_is_dealt_with_and_said(pipeline, tokenizers, tmp_path, name):
    template, ending, note = ODD[name]
    asked = ChatFormat(with_template(tokenizers["byte-level"], template), tmp_path)
    assert [found.startswith(note) for found in asked.notes] == ([True] if note else [])
    puzzle = read_puzzles(pipeline / "puzzles/test.parquet")[0]
    text = asked.prompt_text(puzzle.chat())
    assert puzzle.system_message in text and puzzle.user_message.strip() in text and text.endswith(ending)
    answer = f"<think>Cell 1 expresses CD3D.</think>\n<answer>{' | '.join(puzzle.answer)}</answer>"
    assert batch_reward(asked.response_text(asked.response_ids(answer)), puzzle).total == 1.0


def folding_tokenizer() -> PreTrainedTokenizerFast:
    """Uncased WordPiece, as BERT's: it splits at hyphens and writes them back with spaces."""
    words = "[UNK] cell t b cd8 - positive , alpha beta expresses 1 cd3d . | <think> </think> <answer> </answer> [SEP]".split()
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_tokens(list(RESPONSE_TAGS))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}[SEP]{% endfor %}"
    return made


@pytest.mark.slow(2)
def test_labels_that_the_tokenizer_cannot_write_are_refused(pipeline, tmp_path):
    asked = ChatFormat(folding_tokenizer(), tmp_path)
    asked.refuse_unwritable(["T cell", "b cell"])  # case does not count
    with pytest.raises(
        UserError, match=r"does not give back 1 of 2 labels \('CD8-positive T cell' becomes ' cd8 - positive t"
    ):
        asked.refuse_unwritable(["CD8-positive T cell", "B cell"])
    folder = make_checkpoint(tmp_path / "m", folding_tokenizer(), "qwen2")
    assert "does not give back 1 of 2 labels" in problem_of(folder)
    traces = run_command("sft", "--traces", pipeline / "traces.jsonl", "--model", folder, "--out", tmp_path / "sft")
    assert traces.returncode == 2 and "labels" in traces.stderr and not (tmp_path / "sft").exists()


BAD_TEMPLATES = {
    "none": (None, "has no chat template; take the instruct version"),
    "raises": ("{{ messages[0].role.x.y }}", "its chat template raises"),
    "drops both": ("{{ messages[0].role }}", "its chat template changes or drops the system message"),
    "another tag": (
        OPENED.replace("<think>", "<reasoning>"),
        "ends the prompt in '<reasoning>\\n', which is not the <think> of our answers",
    ),
    "the answer's tag": (OPENED.replace("<think>", "<answer>"), "ends the prompt in '<answer>\\n'"),
    "closes the reasoning": (
        CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think></think>\n{%"),
        "closes the reasoning (</think>) before the model speaks",
    ),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_a_template_that_cannot_ask_is_refused(tokenizers, tmp_path, case):
    template, says = BAD_TEMPLATES[case]
    with pytest.raises(UserError) as refused:
        ChatFormat(with_template(tokenizers["byte-level"], template), tmp_path)
    assert says in str(refused.value)


def test_a_message_that_the_template_changes_is_refused(tokenizers, tmp_path):
    """Where only a puzzle shows it, too: this template escapes HTML."""
    escaping = CHAT_TEMPLATE.replace("message['content']", "message['content'].replace('&', '&amp;')")
    asked = ChatFormat(with_template(tokenizers["byte-level"], escaping), tmp_path)
    with pytest.raises(UserError, match="changes or drops the user message"):
        asked.prompt_ids([{"role": "system", "content": "short"}, {"role": "user", "content": "HLA-A & HLA-B"}])
    cut = CHAT_TEMPLATE.replace("message['content']", "message['content'][:40]")
    with pytest.raises(UserError, match="its chat template changes or drops the"):
        ChatFormat(with_template(tokenizers["byte-level"], cut), tmp_path)


def test_ends_that_cannot_be_are_refused(tokenizers, tmp_path):
    tokenizer = with_template(tokenizers["byte-level"], CHAT_TEMPLATE)
    word = tokenizer.encode("Cell", add_special_tokens=False)[0]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": word}))
    with pytest.raises(UserError, match=rf"config.json names token {word} \('Cell'\) as the end of a response"):
        ChatFormat(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    with pytest.raises(UserError, match="but the model embeds 100"):
        ChatFormat(tokenizer, tmp_path)
    # a token beyond the embedding that no text holds, as the place of an image in the text models of Gemma 3
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    with_image = copy.deepcopy(tokenizer)
    with_image.add_tokens(["<image_soft_token>"], special_tokens=True)
    asked = ChatFormat(with_image, tmp_path)
    assert asked.notes == [
        "the tokenizer has 1 tokens that the model does not embed (such as '<image_soft_token>'); a text with one is refused"
    ]
    with pytest.raises(UserError, match=r"the text holds token \d+ \('<image_soft_token>'\), and the model embeds"):
        asked.prompt_ids(chat("Assign.", "Cell 1: <image_soft_token>"))
    (tmp_path / "config.json").unlink()
    tokenizer = tagged_tokenizer_without_ends(tokenizer)
    with pytest.raises(UserError, match="nothing says which token ends a response"):
        ChatFormat(tokenizer, tmp_path)


def tagged_tokenizer_without_ends(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    plain.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return plain


def test_files_of_a_chat_that_are_damaged_or_wrong_are_named(tokenizers, tmp_path):
    tokenizer = with_template(tokenizers["byte-level"], CHAT_TEMPLATE)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 999999, -1, "2"]}))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    asked = ChatFormat(tokenizer, tmp_path)
    assert asked.stop_ids == (2,) and asked.notes == [
        f"generation_config.json names {wrong} as the end of a response, which is no token: left out"
        for wrong in ("999999", "-1", "'2'")
    ]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id"')
    with pytest.raises(UserError, match="generation_config.json: is not JSON"):
        ChatFormat(tokenizer, tmp_path)
    tokenizer.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    with pytest.raises(UserError, match="its chat templates are named rag, tool_use, and none is named default"):
        ChatFormat(tokenizer, tmp_path)
    plain = tagged_tokenizer_without_ends(tokenizer)
    plain.chat_template = "{{ bos_token + '' }}" + CHAT_TEMPLATE
    with pytest.raises(UserError, match="needs a bos_token, and the tokenizer has none"):
        ChatFormat(plain, tmp_path / "elsewhere")


def test_repeats_are_counted_over_the_batch():
    assert count_repeats(["a", "b", "a", "a", "b"]) == [0, 0, 1, 2, 1]


def test_a_puzzle_twice_in_a_batch_is_sampled_twice(pipeline):
    """And a puzzle that is there once is drawn as it would be alone."""
    policy = trained_policy(pipeline / "base")
    prompt = policy.chat.prompt_ids(read_puzzles(pipeline / "puzzles/test.parquet")[0].chat())
    engine = TorchEngine(policy.model, policy.decoding)
    from tests.helpers.architectures import sampling_of

    alone = engine.generate(["a"], [prompt], sampling_of(policy, n=4, max_tokens=8))
    engine.ask(0, ["a"] * 4, [prompt] * 4, sampling_of(policy, n=4, max_tokens=8))
    groups = engine.collect(0)
    # a batch of other size is summed up in another order: on some CPUs the last digits differ
    for one, other in zip(groups[0], alone[0], strict=True):
        assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=1e-5)
        assert replace(one, sampler_logprobs=other.sampler_logprobs) == other
    assert len({tuple(r.response_ids) for group in groups for r in group}) == 16


def variant(pipeline: Path, folder: Path, template: str | None = None) -> Path:
    """The pipeline's base with another chat template."""
    shutil.copytree(pipeline / "base", folder)
    (folder / "chat_template.jinja").write_text(template or CHAT_TEMPLATE)
    return folder


@pytest.mark.slow(4)
def test_the_opened_tag_is_in_every_text(pipeline, tmp_path):
    """SFT targets, rollouts.jsonl and the prompt of an opened checkpoint, through the real commands."""
    base = variant(pipeline, tmp_path / "r1", OPENED)
    out = succeed(
        "sft",
        "--traces",
        pipeline / "traces.jsonl",
        "--model",
        base,
        "--out",
        tmp_path / "sft",
        "--epochs",
        1,
        "--batch-size",
        64,
        "--lora-rank",
        4,
        "--lora-alpha",
        8,
    )
    assert out.count("so the text of every response begins with it") == 1
    run = tmp_path / "grpo"
    told = succeed(
        "grpo",
        "--model",
        tmp_path / "sft/model",
        "--puzzles",
        pipeline / "puzzles/train.parquet",
        "--out",
        run,
        "--engine",
        "torch",
        "--steps",
        1,
        *SMALL_GRPO,
    )
    assert told.count("so the text of every response begins with it") == 1
    rows = read_rows(run / "rollouts.jsonl")
    assert all(row["completion"].startswith("<think>\n") for row in rows)
    puzzle = read_puzzles(pipeline / "puzzles/test.parquet")[0]
    policy = Policy(str(base), lora_rank=0, lora_alpha=0, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    labels = " | ".join(puzzle.answer)
    trace = {**puzzle.to_row(), "assistant_msg": f"<think>x</think>\n<answer>{labels}</answer>"}
    (example,), _ = encode_traces(policy, [trace], SftConfig(traces="t", model="m", out="o"))
    assert example.prompt_ids == open_checkpoint(base).chat.prompt_ids(puzzle.chat())
    assert policy.tokenizer.decode(example.prompt_ids).endswith(HEADER + "<think>\n")
    assert policy.tokenizer.decode(example.response_ids) == f"x</think>\n<answer>{labels}</answer><|im_end|>"


@pytest.mark.slow(8)
def test_a_resumed_run_shows_its_first_day(pipeline, tmp_path):
    base = variant(pipeline, tmp_path / "dated", DATED)
    asked = (
        *("--model", base, "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "run"),
        *("--engine", "torch", *SMALL_GRPO),
    )
    succeed("grpo", *asked, "--steps", 1, "--date", "2026-02-03")
    succeed("grpo", *asked, "--steps", 2, "--resume")
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["date"] == "2026-02-03"
    whole = tmp_path / "whole"
    succeed("grpo", *asked[:4], "--out", whole, *asked[6:], "--steps", 2, "--date", "2026-02-03")
    assert (whole / "metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()
    done = run_command("grpo", *asked, "--steps", 3, "--resume", "--date", "2026-02-04")
    assert done.returncode == 2 and "date was '2026-02-03'" in done.stderr
    shown = open_checkpoint(sorted((whole / "checkpoints").iterdir())[-1], str(base)).chat
    assert shown.date == DAY


@pytest.mark.slow(4)
def test_an_exported_model_stops_where_ours_does(pipeline, tmp_path):
    """The base names another end than its template and its tokenizer: other servers read generation_config.json alone."""
    base = variant(pipeline, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_k": 5}))
    succeed("export", "--model", base, "--out", tmp_path / "m")
    assert json.loads((tmp_path / "m/generation_config.json").read_text()) == {"eos_token_id": [2, 0], "top_k": 5}
    (base / "generation_config.json").unlink()
    succeed("export", "--model", base, "--out", tmp_path / "n")
    settings = json.loads((tmp_path / "n/generation_config.json").read_text())
    assert settings["eos_token_id"] == 2 and settings["pad_token_id"] == 0


# ---- the table of a checkpoint


def rows_of(folder: Path, **more) -> dict[str, str]:
    return {row.what: row.value for row in check_model(str(folder), **more)}


def problem_of(folder: Path, **more) -> str:
    return " ".join(row.problem for row in check_model(str(folder), **more) if row.problem)


@pytest.mark.slow(4)
def test_check_model_shows_how_a_model_is_asked(pipeline):
    printed = succeed("check_model", pipeline / "base", "--answer-tokens", 4, fresh=True)
    for line in (
        "head                   tied to the embedding",
        "LoRA                   on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj of 2 layers",
        "packing                responses share a prompt",
        "tokens per tag         <think> 1, </think> 1, <answer> 1, </answer> 1",
        "an answer ends at      2 '<|im_end|>' (tokenizer, config.json, generation_config.json)",
        r"prompt ends in         '<|im_end|>\n<|im_start|>assistant\n'",
    ):
        assert line in printed
    table = json.loads(succeed("check_model", pipeline / "base", "--json"))
    assert [row["what"] for row in table][-1] == "a greedy answer" and not any(row["problem"] for row in table)


REFUSED = {
    "gpt2": ({}, "a gpt2 has no model.layers and lm_head; use a Qwen2.5"),
    "opt": ({}, "a opt has no model.layers and lm_head"),
    "gpt_neox": ({}, "a gpt_neox has no model.layers and lm_head"),
    "phi": ({}, "the head of this phi has a bias"),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        "a mixture of experts (num_experts 4)",
    ),
    "qwen2": (
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        "only some layers attend in a sliding window",
    ),
}


@pytest.mark.slow(4)
@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_that_cannot_run_is_refused_by_name(pipeline, tmp_path, kind):
    more, says = REFUSED[kind]
    folder = make_checkpoint(tmp_path / kind, load_tokenizer(str(pipeline / "base")), kind, **more)
    assert says in problem_of(folder)
    done = run_command(
        "grpo",
        "--model",
        folder,
        "--puzzles",
        pipeline / "puzzles/train.parquet",
        "--out",
        tmp_path / "run",
        *SMALL_GRPO,
    )
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()
    dry = run_command("grpo", "--model", folder, "--dry-run", *SMALL_GRPO)
    assert dry.returncode == 2 and says in dry.stdout and "Traceback" not in dry.stderr


def test_a_head_that_the_configuration_denies_is_named(pipeline, tmp_path):
    folder = variant(pipeline, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    assert "but the weight files hold no lm_head.weight" in problem_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert problem_of(folder) == "" and rows_of(folder)["head"] == "a weight of its own"
    (folder / "config.json").write_text(json.dumps(settings))
    assert "hold another lm_head.weight, which would be ignored" in problem_of(folder)


def test_files_that_cannot_be_read_are_named(pipeline, tmp_path):
    folder = variant(pipeline, tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "a weight file is damaged" in problem_of(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "martian"}))
    assert "config.json cannot be used" in problem_of(folder)


# ---- weights, files and kinds of checkpoints that cannot be trained


def with_tensors(folder: Path, change) -> Path:
    """The checkpoint with other tensors. change: takes and returns {name: tensor}."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_settings(folder: Path, **settings: object) -> Path:
    """The checkpoint with other settings in config.json; None takes one out."""
    path = folder / "config.json"
    merged = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


def policy_of(folder: Path) -> Policy:
    return Policy(str(folder), lora_rank=4, lora_alpha=8, seed=0, device=torch.device("cpu"), dtype=torch.float32)


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def spoiled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors[UP][3, 5] = torch.nan
    return tensors


DIFFERENT = {
    "a tensor is missing": (without(UP), {}, f"the weight files lack the tensor {UP}; copy the files again"),
    "PEFT's names": (
        lambda tensors: {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        {},
        "and 26 more; they hold base_model.model.model.embed_tokens.weight",
    ),
    "a layer too many": (
        dict,
        {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        "lack the tensor model.layers.2.self_attn.q_proj.weight and 11 more",
    ),
    "other shapes": (
        dict,
        {"intermediate_size": 96},
        "mlp.down_proj.weight is 64 x 128 in the weight files and 64 x 96",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_weights_that_config_json_does_not_describe_are_refused(pipeline, tmp_path, case):
    change, settings, says = DIFFERENT[case]
    folder = with_settings(with_tensors(variant(pipeline, tmp_path / "m"), change), **settings)
    assert says in problem_of(folder)
    with pytest.raises(UserError) as refused:
        policy_of(folder)
    assert says in str(refused.value)


def refused_by_all(pipeline: Path, tmp_path: Path, folder: Path | str, says: str) -> None:
    """One sentence and exit code 2 from the model check, GRPO and SFT, before anything is written."""
    rank = ("--lora-rank", 4, "--lora-alpha", 8)
    grpo = ("--puzzles", pipeline / "puzzles/train.parquet", "--engine", "torch", *SMALL_GRPO)
    for done in (
        run_command("check_model", folder),
        run_command("grpo", "--model", folder, "--out", tmp_path / "g", *grpo),
        run_command("sft", "--traces", pipeline / "traces.jsonl", "--model", folder, "--out", tmp_path / "s", *rank),
    ):
        assert done.returncode == 2 and says in done.stdout + done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 1
    assert not (tmp_path / "g").exists() and not (tmp_path / "s").exists()


@pytest.mark.slow(2)
def test_a_missing_tensor_stops_every_command(pipeline, tmp_path):
    folder = with_tensors(variant(pipeline, tmp_path / "m"), without(UP))
    refused_by_all(pipeline, tmp_path, folder, f"the weight files lack the tensor {UP}")


@pytest.mark.slow(2)
def test_a_weight_that_is_not_finite_stops_every_command(pipeline, tmp_path):
    folder = with_tensors(variant(pipeline, tmp_path / "m"), spoiled)
    refused_by_all(pipeline, tmp_path, folder, f"the weight {UP} holds a value that is no finite number")


def test_a_tensor_too_many_is_a_note(pipeline, tmp_path):
    more = UP.replace(".1.", ".2.")
    folder = with_tensors(variant(pipeline, tmp_path / "m"), lambda tensors: tensors | {more: tensors[UP].clone()})
    assert problem_of(folder) == ""
    assert rows_of(folder)["note"] == f"the weight files hold {more}, which the model has no place for"


@pytest.mark.slow(2)
@pytest.mark.parametrize("name", TYPES)
def test_names_that_transformers_converts_are_no_difference(pipeline, tmp_path, name):
    kind, more = TYPES[name]
    folder = make_checkpoint(tmp_path / "m", load_tokenizer(str(pipeline / "base")), kind, **more)
    assert problem_of(folder) == ""


def saved_as_base_model(folder: Path) -> None:
    with_tensors(folder, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})
    with_settings(folder, architectures=["Qwen2Model"])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_pickle(folder: Path) -> None:
    pickled(folder)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:5000])


@pytest.mark.slow(2)
def test_how_the_weights_were_saved(pipeline, tmp_path):
    folder = variant(pipeline, tmp_path / "base-model")
    saved_as_base_model(folder)
    assert "saved without their head, as embed_tokens.weight" in problem_of(folder)
    folder = variant(pipeline, tmp_path / "bin")
    pickled(folder)
    assert "its weights are in .bin files, and safetensors are needed; convert it: M = transf" in problem_of(folder)
    given = ("--traces", pipeline / "traces.jsonl", "--model", folder, "--lora-rank", 4)
    done = run_command("sft", *given, "--out", tmp_path / "s")
    assert done.returncode == 2 and "its weights are in .bin files" in done.stderr and not (tmp_path / "s").exists()
    folder = variant(pipeline, tmp_path / "cut")
    cut_pickle(folder)
    assert "a weight file is damaged (pytorch_model.bin: it has no end); copy it again" in problem_of(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(pipeline, tmp_path, name):
    folder = variant(pipeline, tmp_path / "m")
    (folder / name).write_text(POINTER)
    refused_by_all(
        pipeline, tmp_path, folder, f"{folder / name}: is a pointer of Git LFS in place of the file; run `git lfs pull`"
    )


@pytest.mark.slow(3)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_broken_json_is_named(pipeline, tmp_path, name):
    folder = variant(pipeline, tmp_path / "m")
    whole = (folder / name).read_text()
    (folder / name).write_text(whole[: len(whole) // 2])
    refused_by_all(pipeline, tmp_path, folder, f"{folder / name}: is not JSON (")


@pytest.mark.slow(2)
def test_other_files_that_cannot_be_used_are_named(pipeline, tmp_path):
    folder = variant(pipeline, tmp_path / "m")
    whole = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + whole)
    refused_by_all(
        pipeline, tmp_path, folder, "config.json: begins with a byte order mark; save it as UTF-8 without one"
    )
    (folder / "config.json").write_bytes(whole)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "martian"}}))
    refused_by_all(pipeline, tmp_path, folder, "its tokenizer cannot be loaded (")
    (folder / "tokenizer.json").unlink()
    refused_by_all(pipeline, tmp_path, folder, "no tokenizer there (tokenizer.json is missing)")
    (folder / "tokenizer.json").write_text(tokenizer)
    with_settings(folder, eos_token_id="2")
    assert "config.json cannot be used (Validation error for field 'eos_token_id': " in problem_of(folder)


KINDS = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "(quantization_config in config.json: awq)"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "with --quantize nf4 to hold it in 4 bits"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised"),
    "unknown": ({"quantization_config": {"quant_method": "xyz"}}, "its weights are quantised"),
    "reward model": (
        {"architectures": ["Qwen2ForSequenceClassification"]},
        "is a Qwen2ForSequenceClassification, a model that scores texts",
    ),
    "multimodal": (
        {"model_type": "gemma3", "text_config": {}, "vision_config": {}},
        "is a multimodal checkpoint (text and images or sound); take a text-only one, such as gemma-3-1b-it",
    ),
    "own code": (
        {"model_type": "xmodel", "auto_map": {"AutoConfig": "configuration_x.XConfig"}},
        "a xmodel needs Python code of its own (auto_map in config.json), which is never run here",
    ),
    "no language model": ({"model_type": "t5"}, "a t5 is no causal language model; use a Qwen2.5"),
    "no attention": ({"model_type": "mamba", "layer_types": None}, "a mamba has no attention that can be chosen"),
}


@pytest.mark.slow(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_checkpoint_that_cannot_be_trained_is_named(pipeline, tmp_path, kind):
    settings, says = KINDS[kind]
    folder = with_settings(variant(pipeline, tmp_path / "m"), **settings)
    problem = problem_of(folder)
    assert says in problem and len(problem) < 350
    with pytest.raises(UserError):
        policy_of(folder)
    if kind in ("gptq", "own code"):  # own code: nobody is asked whether it may run
        refused_by_all(pipeline, tmp_path, folder, says)


def test_gpt_oss_and_falcon_h1_are_refused_in_a_sentence(pipeline, tmp_path):
    """One by its experts, the other since PEFT refuses its state space layers."""
    tokenizer = load_tokenizer(str(pipeline / "base"))
    folder = make_checkpoint(tmp_path / "gpt", tokenizer, "gpt_oss", num_local_experts=4, head_dim=32)
    assert "a mixture of experts (num_" in problem_of(folder) and len(problem_of(folder)) < 250
    folder = make_checkpoint(tmp_path / "falcon", tokenizer, "falcon_h1")
    assert "PEFT cannot put an adapter on a falcon_h1 (" in problem_of(folder)
    assert problem_of(folder, lora=False) == ""
    with pytest.raises(UserError, match="PEFT cannot put an adapter on a falcon_h1"):
        policy_of(folder)


@pytest.mark.parametrize("scaling", [1.0, 0.5])
def test_a_head_that_scales_in_another_way_is_not_trained_as_another_model(pipeline, tmp_path, scaling):
    """HyperCLOVA X multiplies its logits by what Granite divides them by."""
    tokenizer = load_tokenizer(str(pipeline / "base"))
    folder = make_checkpoint(tmp_path / "m", tokenizer, "hyperclovax", logits_scaling=scaling, head_dim=32)
    cfg = SftConfig(traces="t", model=str(folder), out="o", lora_rank=4, lora_alpha=8)
    if scaling == 1.0:
        load_policy(cfg, torch.device("cpu"))
        return
    with pytest.raises(UserError, match="of this hyperclovax would be others than those of its own class"):
        load_policy(cfg, torch.device("cpu"))


def test_the_tokenizer_is_what_its_file_says_whatever_class_is_named(pipeline, tmp_path):
    """transformers' Llama class drops the spaces of a byte-level vocabulary, as that of DeepSeek-R1-Distill-Llama is."""
    folder = make_checkpoint(tmp_path / "m", load_tokenizer(str(pipeline / "base")), "llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    for name in ("", "tekken.json"):
        if name:  # with it, transformers would take Mistral's own library, which knows no chat template
            shutil.copy(Path(mistral_common.__file__).parent / "data/tekken_240718.json", folder / name)
        tokenizer = load_tokenizer(str(folder))
        text = "Cell 1: CD3D, CD8A\n\nMatch T cell"
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text and tokenizer.chat_template


def test_a_tokenizer_that_loses_spaces_is_refused(tokenizers, tmp_path):
    tokenizer = copy.deepcopy(with_template(tokenizers["byte-level"], CHAT_TEMPLATE))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\s"), "")
    with pytest.raises(UserError, match="its tokenizer loses spaces and line breaks"):
        ChatFormat(tokenizer, tmp_path)


@pytest.mark.slow(2)
def test_what_is_no_checkpoint_is_refused_by_what_it_is(pipeline, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    refused_by_all(
        pipeline, tmp_path, tmp_path / "adapter", "this is an adapter (adapter_config.json is there); merge it"
    )
    hub = "Qwen/Qwen2.5-0.5B-Instruct"
    refused_by_all(
        pipeline, tmp_path, hub, f"nothing is downloaded from a hub; fetch the model (hf download {hub} --local"
    )
    refused_by_all(pipeline, tmp_path, pipeline / "base/config.json", "is a file; name the folder of the checkpoint")
    refused_by_all(pipeline, tmp_path, tmp_path, "no Hugging Face checkpoint there (config.json is missing)")


@pytest.mark.slow(2)
def test_a_lora_rank_above_the_hidden_size_is_refused(pipeline, tmp_path):
    says = "Error: --lora-rank 65: more than the model's hidden size 64"
    small = [option if option != 8 else 65 for option in SMALL_GRPO]
    grpo = ("--puzzles", pipeline / "puzzles/train.parquet", *small)
    sft = ("--traces", pipeline / "traces.jsonl", "--lora-rank", 65)
    for verb, given in (("grpo", grpo), ("sft", sft)):
        done = run_command(verb, "--model", pipeline / "base", "--out", tmp_path / verb, *given)
        assert done.returncode == 2 and done.stderr.startswith(says) and not (tmp_path / verb).exists()


YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
CONTEXTS = {
    "no scaling": ({}, 512),
    "llama3": ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, 512),
    "llama3, new": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 512),
    "longrope": ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, 512),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
    "linear, new": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 2048),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024),
    "dynamic, new": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 1024),
    "yarn, number before": ({"rope_scaling": {"type": "yarn", **YARN}}, 2048),
    "yarn, scaled number": ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "yarn", **YARN}}, 2048),
    "by kind of layer": ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}}, 2048),
    "Gemma 3": ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 512),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_context_is_read_in_both_spellings(name):
    settings, positions = CONTEXTS[name]
    assert context_of({"max_position_embeddings": 512, **settings}) == positions


def test_positions_are_steady_up_to_where_they_depend_on_what_stands_beside_them():
    """Phi 3's factors for long texts are taken when any text of the pass is long; in vLLM when one might be."""
    longrope = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    assert steady_positions({**longrope, "rope_scaling": {"type": "longrope"}}) == 4096
    inside = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    assert steady_positions({"max_position_embeddings": 512, "rope_parameters": inside}) == 32
    for settings, _ in CONTEXTS.values():
        kind = str(settings)
        wanted = 512 if "dynamic" in kind else math.inf
        assert steady_positions({"max_position_embeddings": 512, **settings}) == wanted, kind


def test_a_scaling_of_attention_that_nobody_reads_is_named_with_its_remedy(pipeline, tmp_path):
    """DeepSeek-R1-0528-Qwen3-8B: its authors' factor makes YaRN's own 1."""
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attn_factor": 0.8782488562869419,
    }
    model = shutil.copytree(pipeline / "base", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for more, named in ({}, True), ({"attention_factor": 1.0}, False):
        rope = yarn | more | {"rope_theta": 10000.0}
        (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
        problems = [row.problem for row in check_model(str(model)) if row.problem]
        assert [one for one in problems if 'write "attention_factor": 1.0 beside it' in one] == problems[:1] * named
    for fine in (
        {"type": "linear", "factor": 4.0, "attn_factor": 0.5},
        {"type": "yarn", "factor": 1.5, "attn_factor": 1.0},
        {"type": "yarn", "factor": 4.0, "attn_factor": None},
    ):
        assert unread_scaling({"rope_scaling": fine}) == ""
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": yarn | {"rope_theta": 10000.0}}))
    begun = check_model(str(model), begun=True)  # a run goes on with the attention that it has
    assert not [row.problem for row in begun if "attn_factor" in row.problem]


def test_a_model_with_longrope_is_not_asked_where_vllm_takes_its_other_factors(tmp_path, capsys):
    """vLLM takes the long factors for every position when prompt and response may be longer; training never does."""
    inside = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    shape = {"max_position_embeddings": 512, "rope_parameters": inside}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    opened = SimpleNamespace(base=tmp_path, folder=tmp_path, adapter={})
    refuse_other_positions(opened, 64)
    with pytest.raises(UserError, match="--max-response-tokens: .* up to 80 tokens, and beyond 64 .* give 16 fewer"):
        refuse_other_positions(opened, 80)
    opened.adapter = None  # trained elsewhere: it may know them
    refuse_other_positions(opened, 80)
    assert "note: prompt and response have up to 80 tokens, and beyond 64" in capsys.readouterr().err
    examples = [SimpleNamespace(prompt_ids=[1] * 50)]
    policy = SimpleNamespace(causal_lm=SimpleNamespace(config=SimpleNamespace(to_dict=lambda: shape)))
    cfg = SftConfig(traces="t", model="m", out="o", eval_engine="vllm", eval_response_tokens=30, holdout=0.1)
    with pytest.raises(UserError, match="more than the model's 64 positions as it is trained; use at most 14"):
        check_held_out(examples, policy, cfg)
    check_held_out(examples, policy, replace(cfg, eval_response_tokens=14))


@pytest.mark.slow(2)
def test_prompts_beyond_the_scaled_context_are_refused(pipeline, tmp_path):
    """And within it they are not; of YaRN vLLM wants the scaled number in config.json."""
    base = variant(pipeline, tmp_path / "m")

    def problem(*given: object, **settings: object) -> str:
        folder = with_settings(base, max_position_embeddings=256, rope_scaling=None, **settings)
        small = ("--prompts-per-step", 4, "--max-prompt-tokens", 1000, "--max-response-tokens", 16, "--lora-rank", 4)
        printed = run_command("grpo", "--model", folder, "--dry-run", *small, *given).stdout
        return next((line.strip() for line in printed.splitlines() if "PROBLEM: --max-prompt" in line), "")

    assert problem(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}) == ""
    dynamic = problem(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    assert "beyond 256 tokens this model turns every position by the longest sequence beside it" in dynamic
    assert "more than the model's 256 positions" in problem(rope_parameters={"rope_type": "llama3", "factor": 8.0})
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    assert problem("--engine", "torch", rope_parameters=yarn) == ""
    assert (
        "vLLM takes max_position_embeddings 256 of config.json as the end of YaRN's positions; set it to 1024"
        in problem(rope_parameters=yarn)
    )


def test_too_little_memory_for_vllm_is_no_fault_of_the_model(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    said = "larger than the available KV cache memory (1.0 GiB). Try increasing `gpu_memory_utilization`"
    told = why_not_started("m", ValueError(f"To serve at least one request, 1.2 GiB KV cache is needed, {said}"))
    assert "vLLM has too little memory (To serve at least one" in told and "--engine torch" not in told
    assert "set VLLM_CPU_KVCACHE_SPACE to more GiB, or give a smaller --max-response-tokens" in told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = why_not_started("m", ValueError("Free memory on device is less than desired GPU memory utilization (0.9)"))
    assert "--memory-fraction is its share of the GPU: lower it" in told
    assert "vLLM does not start with this model" in why_not_started("m", ValueError("no such architecture"))


@pytest.mark.vllm
@pytest.mark.slow(10)
def test_a_model_that_vllm_cannot_start_is_refused_in_a_sentence(pipeline, tmp_path):
    """LFM2: transformers' class runs here, and vLLM wants a setting that its config.json lacks."""
    folder = make_checkpoint(tmp_path / "lfm2", load_tokenizer(str(pipeline / "base")), "lfm2")
    assert problem_of(folder) == "" and "vLLM may not load it" in rows_of(folder)["architecture"]
    given = ("--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "run", *SMALL_GRPO)
    done = run_command("grpo", "--model", folder, *given)
    assert done.returncode == 2 and f"Error: --model {folder}: vLLM does not start with this model (" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.vllm
@pytest.mark.slow(8)
def test_more_tokens_than_the_model_has_positions_for_are_refused_with_the_option(pipeline, tmp_path):
    given = ("--puzzles", pipeline / "puzzles/test.parquet", "--limit", 2, "--out", tmp_path / "eval")
    done = run_command("evaluate", *given, "--model", pipeline / "base", "--max-response-tokens", 1_000_000)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = r"--max-response-tokens: the longest prompt and response would have 1,000,\d+ tokens, and .*positions for [\d,]+ "
    assert re.search(said, done.stderr) and done.stderr.rstrip().endswith("fewer")


# ---- every architecture


SAMPLERS = ("torch", "vllm", "vllm, third adapter", "merged")


@pytest.fixture(scope="module")
def measured(pipeline, tmp_path_factory) -> dict[str, dict]:
    printed = succeed(ROOT / "tests/helpers/architectures.py", pipeline / "base", tmp_path_factory.mktemp("types"))
    rows = [json.loads(line.removeprefix("RESULT ")) for line in printed.splitlines() if line.startswith("RESULT ")]
    return {row["name"]: row for row in rows}


@pytest.mark.vllm
@pytest.mark.slow(5)
@pytest.mark.parametrize("name", TYPES)
def test_samplers_and_trainer_agree_on_every_architecture(measured, name):
    found = measured[name]
    distances = {key: found[key] for key in SAMPLERS if key in found}
    assert set(distances) >= set(SAMPLERS[:3]) and all(value < 5e-6 for value in distances.values()), distances
    assert found["gradient"] < 1e-5
    assert found["shares"] == (name not in ("Mistral with a window", "Gemma 2", "Gemma 3"))


@pytest.mark.vllm
def test_nothing_leaks_into_a_sampler(measured):
    """A nucleus changes what is drawn and not its log-prob; generation_config.json changes nothing; our ends are the ends."""
    found = measured["sampling"]
    for engine in ("torch", "vllm"):
        assert found[f"{engine}, whole"] < 5e-6 and found[f"{engine}, nucleus"] < 5e-6
        assert found[f"{engine}, distinct"] == 6  # top_k 1 would make the three responses of a prompt one
        assert all(found[f"{engine}, stops"])


def test_a_nucleus_at_another_temperature_is_refused_for_vllm():
    from trainer.config import GrpoConfig

    with pytest.raises(UserError, match="--top-p 0.9 and --temperature 0.7: vLLM then reports"):
        GrpoConfig(top_p=0.9, temperature=0.7)
    GrpoConfig(top_p=0.9, temperature=0.7, engine="torch")
