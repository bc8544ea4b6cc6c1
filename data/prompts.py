"""The text around a puzzle: system message, user message, chat layout, response layout.

All stages (distillation, SFT, GRPO, evaluation) use one layout: a system message and a user message. The published
CellPuzzles rows have exactly these bytes (Cell-o1, arXiv:2506.02911, Table 1), so a published row that is parsed and
rendered again does not change.

A puzzle has one of three variants: "batch" (the published one), "cell" (one cell of a batch alone, appendix C) and
"open" (a batch without candidates, appendix D). data/variants.py makes the last two. A file that was written with another
system message keeps it: the row says what is asked.
"""

import datetime
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import read_settings

SYSTEM_MESSAGE = (
    "You are an expert assistant specialized in cell type annotation. You will be given a batch of N cells from the "
    "same donor, where each cell represents a unique cell type. For each cell, the top expressed genes are provided in "
    "descending order of expression. Using both the gene expression data and donor information, determine the correct "
    "cell type for each cell. You will also receive a list of N candidate cell types, and each candidate must be "
    "assigned to exactly one cell. Ensure that you consider all cells and candidate types together, rather than "
    "annotating each cell individually. Include your detailed reasoning within <think> and </think> tags, and provide "
    "your final answer within <answer> and </answer> tags. The final answer should be a single string listing the "
    "assigned cell types in order, separated by ' | '."
)

# Table 10, word for word. The paper does not show the user message of a single cell: its layout below is the batch's.
CELL_SYSTEM_MESSAGE = (
    "You are an expert assistant specialized in cell type annotation. You will be given the gene expression profile of a "
    "single cell from a specific donor. The top expressed genes are listed in descending order. Use both gene expression "
    "and donor context to determine the correct cell type. You will also receive a list of candidate cell types\u2014choose "
    "the one that best fits this cell. Include your detailed reasoning within <think> and </think> tags, and provide your "
    "final answer within <answer> and </answer> tags. The final answer should be a single string with exactly one cell "
    "type."
)
# Appendix D describes the open-ended set-up and shows no prompt: the model names a cell type for each cell of the batch,
# from genes and context, without a list of labels. So this is the published message without what it says of candidates.
OPEN_SYSTEM_MESSAGE = SYSTEM_MESSAGE.replace(
    " You will also receive a list of N candidate cell types, and each candidate must be assigned to exactly one cell.",
    "",
).replace("all cells and candidate types together", "all cells together")
SYSTEM_MESSAGES = {"batch": SYSTEM_MESSAGE, "cell": CELL_SYSTEM_MESSAGE, "open": OPEN_SYSTEM_MESSAGE}

CONTEXT_HEAD = "Context: "
CANDIDATES_HEAD = "Match the cells above to one of the following cell types:\n"
CELL_CANDIDATES_HEAD = "Match the cell above to one of the following cell types:\n"
OPEN_REQUEST = "Name the cell type of each cell above."
LABEL_SEPARATOR = " | "
ANSWER_SHOWN = "\n\nA correct answer to this puzzle is:\n{answer}\n\nNow answer the puzzle yourself."
"""What follows the user message where a model is shown an answer before it gives its own (GRPO's --distill-failures)."""

RESPONSE_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
"""The call of a chat template that asks for today's date in a format."""
_SAME_SIGN = {ord(hyphen): "-" for hyphen in "\u2010\u2011\u2212"}
_SAME_SIGN |= dict.fromkeys((0xAD, *range(0x200B, 0x2010), 0x2060, 0xFEFF))
"""{character: what it looks like}: other hyphens, which chat models write, and None for characters without a width."""
RESPONSE_LAYOUT = re.compile(r"\s*<think>(?P<reasoning>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)


def variant_of(n_cells: int, n_candidates: int) -> str:
    """The variant: "open" without candidates, "cell" for one cell with several candidates, otherwise "batch"."""
    if n_candidates == 0:
        return "open"
    return "cell" if n_cells == 1 and n_candidates > 1 else "batch"


def user_message(context: str, cells: list[list[str]], candidates: list[str], context_tail: str = " ") -> str:
    """Render the user message of a puzzle of any variant.

    context_tail: the characters between the context and the blank line. The published rows have one space there.
    """
    cell_lines = [f"Cell {number}: {', '.join(genes)}" for number, genes in enumerate(cells, start=1)]
    head = {"batch": CANDIDATES_HEAD, "cell": CELL_CANDIDATES_HEAD, "open": OPEN_REQUEST}
    request = head[variant_of(len(cells), len(candidates))] + "\n".join(candidates)
    return "\n\n".join([f"{CONTEXT_HEAD}{context}{context_tail}", "\n".join(cell_lines), request])


def answer_text(labels: list[str]) -> str:
    """The correct answer as the published rows write it: labels in cell order, joined by ' | '."""
    return LABEL_SEPARATOR.join(labels)


def normalise_label(label: str) -> str:
    """The form in which labels are compared: trimmed, inner white space collapsed, case ignored, composed (Unicode's NFC).

    What looks the same is the same: a letter with its accent is one character or two, a hyphen one of several.

    >>> normalise_label(" M\xfcller\xa0 glia ") == normalise_label("mu\u0308ller GLIA")
    True
    """
    seen = label if label.isascii() else label.translate(_SAME_SIGN)
    folded = unicodedata.normalize("NFD", " ".join(seen.split())).casefold()
    return unicodedata.normalize("NFC", folded)


def chat(system_msg: str, user_msg: str) -> list[dict[str, str]]:
    """The chat turns for a tokenizer's chat template or an OpenAI-compatible endpoint."""
    return [{"role": "system", "content": system_msg}, {"role": "user", "content": user_msg}]


def showing_an_answer(chat: list[dict[str, str]], answer: str) -> list[dict[str, str]]:
    """The turns of a puzzle's chat, with a correct answer to it at the end of the user message. answer: a whole response."""
    *before, user = chat
    return [*before, {**user, "content": user["content"] + ANSWER_SHOWN.format(answer=answer.strip())}]


# ---- the same conversation as tokens of one model: the only place that renders a prompt or decodes a response


class ChatFormat:
    """How one model writes a conversation: the tokens of a prompt, the end of a turn, the text of a response.

    Distillation, the cold start, GRPO, evaluation and export all use it, so they cannot differ. Chat templates of models
    differ in ways that would spoil a run without a word (an opened <think>, no system role, a date); what was found and
    how it is dealt with is in `notes`.
    """

    def __init__(self, tokenizer: Any, model_dir: str | Path, date: datetime.date | None = None) -> None:
        """tokenizer: of transformers, from the checkpoint in model_dir. date: the day that a template with a date shows.

        Raises UserError when the model cannot be asked in its own format: no chat template, one that loses a message, no
        end-of-turn token, a tokenizer that does not give back an answer.
        """
        self.tokenizer, self.model, self.folder = tokenizer, f"--model {model_dir}", Path(model_dir)
        self.date = date or datetime.date.today()
        self.notes: list[str] = []
        """Sentences about what is unusual, for the console."""
        self.switches: dict[str, bool] = {}
        """Variables of the template that turn a model's reasoning on."""
        self.system_in_user = self.in_parts = False
        """Is the system message put before the user's, for want of a system role; are messages lists of parts?"""
        self._numbers: dict[int, int] = {}
        self.header = ""
        """The head of the assistant's turn, where the template leaves it to the caller."""
        self._check_template()
        self._check_vocabulary()
        self._place_messages()
        self.opening = self._find_opening()
        """What the template has written of the response itself: "<think>", "<think>\\n", or ""."""
        named = self._ends_by_source()
        self.turn_end = self._find_turn_end(named)
        """The token that ends a response in training; the template's own where it is a token of the vocabulary."""
        self.ends = {self.turn_end: ["chat template"]} | named if self.turn_end not in named else named
        """{token id that ends a response: the files that say so}"""
        self.stop_ids = tuple(sorted(self.ends))
        """The tokens at which sampling ends: all that the tokenizer, the configurations and the template name."""
        self._check_answers()

    def shows_date(self) -> bool:
        """Is the date a part of every prompt?"""
        return "strftime_now(" in self._template()

    def prompt_text(self, chat: list[dict[str, str]]) -> str:
        """The prompt, ending where the model begins to speak. Raises UserError when the template loses a message."""
        text = self._render(chat)
        for message in chat:
            if message["content"].strip() not in text:
                raise UserError(
                    f"{self.model}: its chat template changes or drops the {message['role']} message "
                    f"({message['content'].strip()[:60]!r}...); correct the template (chat_template.jinja)"
                )
        return text + self.header

    def prompt_ids(self, chat: list[dict[str, str]]) -> list[int]:
        """[P] tokens of the prompt."""
        # the template has written all special tokens: a tokenizer that adds BOS would double it
        return self._embedded(self.tokenizer(self.prompt_text(chat), add_special_tokens=False)["input_ids"])

    def response_ids(self, text: str) -> list[int]:
        """[T] tokens of a whole response as the model would sample them: what the prompt left to say, and the end of turn."""
        if self.opening and text.lstrip().startswith(RESPONSE_TAGS[0]):
            text = text.lstrip().removeprefix(RESPONSE_TAGS[0])
            if self.opening[-1].isspace():
                text = text.lstrip()
        # tokenized apart from the prompt, as a sampled response is
        return [*self._embedded(self.tokenizer.encode(text, add_special_tokens=False)), self.turn_end]

    def _embedded(self, ids: list[int]) -> list[int]:
        """The tokens themselves. Raises UserError for one that the model has no embedding of."""
        if ids and max(ids) >= self.vocabulary:
            raise UserError(
                f"{self.model}: the text holds token {max(ids)} ({self.tokenizer.decode([max(ids)])!r}), and the model embeds "
                f"{self.vocabulary} (vocab_size); take that text out, or resize the embedding"
            )
        # one object for equal ids: 100,000 prompts of 3,000 would take 11 GB otherwise
        known = self._numbers.setdefault
        return [known(token, token) for token in ids]

    def response_text(self, ids: list[int]) -> str:
        """The text of a response: with the tag that the prompt ended in, without the end of turn and padding.

        Other special tokens stay: in some vocabularies <think> and <answer> are special.
        """
        ids = list(ids[:-1] if ids and ids[-1] in self.ends else ids)
        pad = self.tokenizer.pad_token_id
        text = self.tokenizer.decode(
            [token for token in ids if token != pad], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return self.opening + text

    def refuse_unwritable(self, labels: Iterable[str]) -> None:
        """Raises UserError when the tokenizer does not give a label back: every right answer with it would be wrong."""
        labels, found = sorted(set(labels)), []
        for label in labels:
            read = RESPONSE_LAYOUT.fullmatch(
                self.response_text(self.response_ids(f"<think></think><answer>{label}</answer>"))
            )
            written = read["answer"] if read else ""
            if normalise_label(label) != normalise_label(written):
                found.append(f"{label!r} becomes {written!r}")
        if found:
            raise UserError(
                f"{self.model}: its tokenizer does not give back {len(found)} of {len(labels)} labels ({found[0]}), so right "
                "answers would count as wrong; take a model whose tokenizer keeps case, accents and hyphens"
            )

    # ---- what is found out when it is made

    def _template(self) -> str:
        template = getattr(self.tokenizer, "chat_template", None)
        return (template.get("default") if isinstance(template, dict) else template) or ""

    def _render(self, chat: list[dict[str, str]], to_speak: bool = True) -> str:
        turns = system_before_user(chat) if self.system_in_user else chat
        if self.in_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        # in place of transformers' clock: a resumed run asks with its first day. In the template's text, since newer
        # versions of transformers hand no function to a template
        template = self._template()
        dated = _DATE_CALL.sub(lambda call: json.dumps(self.date.strftime(call[2])), template)
        clock = {"strftime_now": self.date.strftime} if "strftime_now(" in dated else {}  # of a format that is computed
        clock |= {"chat_template": dated} if dated != template else {}
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=to_speak, **clock, **self.switches
        )

    def _check_template(self) -> None:
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                f"{self.model}: its tokenizer has no chat template; take the instruct version of the model, or put its "
                "template into the folder as chat_template.jinja"
            )
        if isinstance(template, dict) and "default" not in template:
            raise UserError(
                f"{self.model}: its chat templates are named {', '.join(template)}, and none is named default; put the one "
                "to use into the folder as chat_template.jinja"
            )
        if self.tokenizer.bos_token is None and re.search(r"\bbos_token\s*\+|\+\s*bos_token\b", str(template)):
            raise UserError(
                f"{self.model}: its chat template needs a bos_token, and the tokenizer has none; name it in "
                "tokenizer_config.json"
            )

    def _check_vocabulary(self) -> None:
        size = self._settings("config.json").get("vocab_size")
        token, last = max(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        self.vocabulary = size if isinstance(size, int) else last + 1
        beyond = {name: number for name, number in self.tokenizer.get_vocab().items() if number >= self.vocabulary}
        own = {self.tokenizer.pad_token, self.tokenizer.eos_token, self.tokenizer.bos_token, *RESPONSE_TAGS}
        if beyond and beyond.keys() <= self.tokenizer.get_added_vocab().keys() - own:
            self.notes.append(  # such as the place of an image in the text models of Gemma 3
                f"the tokenizer has {len(beyond)} tokens that the model does not embed (such as {next(iter(beyond))!r}); a text "
                "with one is refused"
            )
        elif beyond:
            raise UserError(
                f"{self.model}: its tokenizer has token {last} ({token!r}), but the model embeds {size} (vocab_size); take "
                "the tokenizer that the model was trained with, or resize its embedding"
            )

    def _settings(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint; {} where it is missing. Raises UserError when it is damaged."""
        path = self.folder / name
        return read_settings(path) if path.is_file() else {}

    def _place_messages(self) -> None:
        """Find a way of giving both messages that loses neither."""
        problems = []
        for self.in_parts, self.system_in_user in ((False, False), (False, True), (True, False), (True, True)):
            try:
                text = self._render(PROBE)
            except Exception as error:  # a template is a program of somebody else's: it may raise anything
                problems.append(f"raises {' '.join(str(error).split()) or type(error).__name__!r}")
                continue
            lost = [turn["role"] for turn in PROBE if turn["content"] not in text]
            if not lost:
                break
            problems.append(f"changes or drops the {lost[0]} message")
        else:
            raise UserError(
                f"{self.model}: its chat template {problems[1]}; correct the template (chat_template.jinja)"
            )
        if self.system_in_user:
            self.notes.append(
                f"the chat template {problems[0]}, so the system message stands at the head of the user message"
            )
        if text.count(PROBE_USER) > 1:
            self.notes.append(f"the chat template writes the user message {text.count(PROBE_USER)} times")
        own = text
        for piece in (*(turn["content"] for turn in PROBE), *self.tokenizer.all_special_tokens):
            own = own.replace(piece, " ")
        if len(re.findall(r"[^\W\d_]", own)) > 40:  # more letters than the names of three roles
            self.notes.append(
                f"the chat template adds words of its own to every prompt: {' '.join(own.split())[:200]!r}"
            )

    def _find_opening(self) -> str:
        for self.switches in ({}, {"enable_thinking": True}, {"thinking": True}):
            text = self._render(PROBE)
            # what the template writes before an answer; some put an empty reasoning block there
            before = re.sub(r"<think>\s*</think>\s*$", "", self._answered()[0])
            told = text.removeprefix(before) if before and text.startswith(before) else text.rpartition(PROBE_USER)[2]
            if "</think>" in told:
                continue  # the template answers for the model that it has thought already
            if self.switches:
                self.notes.append(f"the chat template reasons with {next(iter(self.switches))}=True, so that is set")
            ignores_turn = text == self._render(PROBE, to_speak=False)
            if ignores_turn and before.startswith(text) and before[len(text) :].strip():
                self.header = before[len(text) :]
                self.notes.append(
                    f"the chat template ends before the assistant's turn, so {self.header!r} is put after it"
                )
            opened = re.search(r"<(think|answer|thinking|thought|reasoning|analysis)\b[^>]*>.*$", told, re.DOTALL)
            if opened and opened[1] != "think":
                raise UserError(
                    f"{self.model}: its chat template ends the prompt in {opened[0]!r}, which is not the <think> of our "
                    "answers; take that part out of chat_template.jinja"
                )
            if opened:
                self.notes.append(
                    f"the chat template ends the prompt in {opened[0]!r}, so the text of every response begins with it"
                )
            return opened[0] if opened else ""
        raise UserError(
            f"{self.model}: its chat template closes the reasoning (</think>) before the model speaks; use the template of "
            "the reasoning model, or take that part out of chat_template.jinja"
        )

    def _answered(self) -> tuple[str, str]:
        """What the template writes before and after an answer; empty where it knows no answers, which asking does not need."""
        try:
            text = self._render([*PROBE, {"role": "assistant", "content": PROBE_ANSWER}], to_speak=False)
        except Exception:  # as above
            return "", ""
        before, _, after = text.rpartition(PROBE_ANSWER)
        return before, after.lstrip()

    def _ends_by_source(self) -> dict[int, list[str]]:
        """{token id: where it is named as the end}: by the tokenizer, config.json or generation_config.json."""
        named: dict[int, list[str]] = {}
        if self.tokenizer.eos_token_id is not None:
            named.setdefault(self.tokenizer.eos_token_id, []).append("tokenizer")
        for name in ("config.json", "generation_config.json"):
            ends = self._settings(name).get("eos_token_id")
            for token in ends if isinstance(ends, list) else [ends]:
                if isinstance(token, int) and 0 <= token < self.vocabulary:
                    named.setdefault(token, []).append(name)
                elif token is not None:
                    self.notes.append(f"{name} names {token!r} as the end of a response, which is no token: left out")
        return named

    def _find_turn_end(self, named: dict[int, list[str]]) -> int:
        """The token that follows an answer in the template; the tokenizer's EOS where that is no single token."""
        ids = self.tokenizer.encode(self._answered()[1], add_special_tokens=False)[:1]
        if ids and (ids[0] in self.tokenizer.all_special_ids or ids[0] in named or self._is_special(ids[0])):
            return ids[0]
        if not named:
            raise UserError(
                f"{self.model}: nothing says which token ends a response: the tokenizer has no eos_token, config.json and "
                "generation_config.json no eos_token_id, and the chat template ends a turn with no special token; set "
                "eos_token in tokenizer_config.json"
            )
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(named)

    def _is_special(self, token: int) -> bool:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).get(token)
        return added is not None and added.special

    def _check_answers(self) -> None:
        """Raises UserError when the tokenizer cannot write an answer, or the model would stop in the middle of one."""
        ids = self._embedded(self.response_ids(PROBE_RESPONSE))
        for token in ids[:-1]:
            if token in self.ends:
                raise UserError(
                    f"{self.model}: {' and '.join(self.ends[token])} names token {token} "
                    f"({self.tokenizer.decode([token])!r}) as the end of a response, but ordinary answers contain it; "
                    "correct eos_token_id there"
                )
        for text in (PROBE_USER, PROBE_RESPONSE):
            again = self.tokenizer.decode(
                self.tokenizer.encode(text, add_special_tokens=False),
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            if "".join(again.split()) == "".join(text.split()) and again.split() != text.split():
                raise UserError(
                    f"{self.model}: its tokenizer loses spaces and line breaks ({text!r} becomes {again!r}), so it is not the "
                    "one that the model was trained with; take its tokenizer.json"
                )
        read = self.response_text(ids)
        if not RESPONSE_LAYOUT.fullmatch(read):
            raise UserError(
                f"{self.model}: its tokenizer does not give back the tags of an answer: {PROBE_RESPONSE!r} becomes "
                f"{read!r}; add <think>, </think>, <answer> and </answer> to its vocabulary"
            )


PROBE_USER = "Cell 1: CD3D, CD8A, TRAC\n\nMatch the cell above."
"""With a line break, which would be escaped where a template prints a list of parts as Python writes it."""
PROBE = chat(SYSTEM_MESSAGE, PROBE_USER)
"""A conversation to try a template with. The system message names our tags: some templates cut a "</think>" out of it."""
PROBE_ANSWER = "CD8-positive, alpha-beta T cell | B cell"
PROBE_RESPONSE = f"<think>Cell 1 expresses CD3D.</think>\n<answer>{PROBE_ANSWER}</answer>"


def system_before_user(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns for a template without a system role: the system message at the head of the user message."""
    if chat[0]["role"] != "system":
        return chat
    system, user, *rest = chat
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
