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
from pathlib import Path
from typing import Any

from data.errors import UserError

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

RESPONSE_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
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


def chat(system_msg: str, user_msg: str) -> list[dict[str, str]]:
    """The chat turns for a tokenizer's chat template or an OpenAI-compatible endpoint."""
    return [{"role": "system", "content": system_msg}, {"role": "user", "content": user_msg}]


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
        end-of-turn token, a tokenizer that does not give back the tags of an answer.
        """
        self.tokenizer, self.model = tokenizer, f"--model {model_dir}"
        self.date = date or datetime.date.today()
        self.switches: dict[str, bool] = {}
        """Variables of the template that turn a model's reasoning on."""
        self.system_in_user = False
        """Is the system message put before the user's, for want of a system role?"""
        self.notes: list[str] = []
        """Sentences about what is unusual, for the console."""
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{self.model}: its tokenizer has no chat template; take the instruct version of the model, or put its "
                "template into the folder as chat_template.jinja"
            )
        self._check_vocabulary(Path(model_dir) / "config.json")
        self._place_system_message()
        self.opening = self._find_opening()
        """What the template has written of the response itself: "<think>", "<think>\\n", or ""."""
        named = self._end_ids_by_source(Path(model_dir))
        self.turn_end = self._find_turn_end(named)
        """The token that ends a response in training; the template's own where it is a token of the vocabulary."""
        self.ends = {self.turn_end: ["chat template"]} | named if self.turn_end not in named else named
        """{token id that ends a response: the files that say so}"""
        self.stop_ids = tuple(sorted(self.ends))
        """The tokens at which sampling ends: all that the tokenizer, the configurations and the template name."""
        self._check_answers()

    def prompt_text(self, chat: list[dict[str, str]]) -> str:
        """The prompt, ending where the model begins to speak. Raises UserError when the template loses a message."""
        text = self._render(chat)
        for message in chat:
            if message["content"].strip() not in text:
                raise UserError(
                    f"{self.model}: its chat template changes or drops the {message['role']} message "
                    f"({message['content'].strip()[:60]!r}...); correct the template (chat_template.jinja)"
                )
        return text

    def prompt_ids(self, chat: list[dict[str, str]]) -> list[int]:
        """[P] tokens of the prompt."""
        # the template has written all special tokens: a tokenizer that adds BOS would double it
        return list(self.tokenizer(self.prompt_text(chat), add_special_tokens=False)["input_ids"])

    def response_ids(self, text: str) -> list[int]:
        """[T] tokens of a whole response as the model would sample them: what the prompt left to say, and the end of turn."""
        if self.opening and text.lstrip().startswith(RESPONSE_TAGS[0]):
            text = text.lstrip().removeprefix(RESPONSE_TAGS[0])
            if self.opening[-1].isspace():
                text = text.lstrip()
        # tokenized apart from the prompt, as a sampled response is
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.turn_end]

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

    def _render(self, chat: list[dict[str, str]], to_speak: bool = True) -> str:
        if self.system_in_user:
            chat = system_before_user(chat)
        return self.tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=to_speak,
            strftime_now=self.date.strftime,  # in place of transformers' clock: a resumed run asks with its first day
            **self.switches,
        )

    def _check_vocabulary(self, config: Path) -> None:
        size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None
        token, last = max(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        if size and last >= size:
            raise UserError(
                f"{self.model}: its tokenizer has token {last} ({token!r}), but the model embeds {size} (vocab_size); take "
                "the tokenizer that the model was trained with, or resize its embedding"
            )

    def _place_system_message(self) -> None:
        problems = []
        for self.system_in_user in (False, True):
            try:
                text = self._render(chat(PROBE_SYSTEM, PROBE_USER))
            except Exception as error:  # a template is a program of somebody else's: it may raise anything
                problems.append(f"raises {' '.join(str(error).split()) or type(error).__name__!r}")
                continue
            lost = [what for what, probe in (("system", PROBE_SYSTEM), ("user", PROBE_USER)) if probe not in text]
            if not lost:
                if self.system_in_user:
                    self.notes.append(
                        f"the chat template {problems[0]}, so the system message stands at the head of the user message"
                    )
                return
            problems.append(f"drops the {lost[0]} message")
        raise UserError(f"{self.model}: its chat template {problems[-1]}; correct the template (chat_template.jinja)")

    def _find_opening(self) -> str:
        for switches in ({}, {"enable_thinking": True}, {"thinking": True}):
            self.switches = switches
            told = self._render(chat(PROBE_SYSTEM, PROBE_USER)).rpartition(PROBE_USER)[2]
            if re.search(r"</think>\s*$", told):
                continue  # the template answers for the model that it has thought already
            if switches:
                self.notes.append(f"the chat template reasons with {next(iter(switches))}=True, so that is set")
            opened = re.search(r"<think>\s*$", told)
            if opened:
                self.notes.append(
                    f"the chat template ends the prompt in {opened[0]!r}, so the text of every response begins with it"
                )
            return opened[0] if opened else ""
        raise UserError(
            f"{self.model}: its chat template closes the reasoning (</think>) before the model speaks; use the template of "
            "the reasoning model, or take that part out of chat_template.jinja"
        )

    def _end_ids_by_source(self, folder: Path) -> dict[int, list[str]]:
        """{token id: where it is named as the end}: by the tokenizer, config.json or generation_config.json."""
        named: dict[int, list[str]] = {}
        if self.tokenizer.eos_token_id is not None:
            named.setdefault(self.tokenizer.eos_token_id, []).append("tokenizer")
        for name in ("config.json", "generation_config.json"):
            path = folder / name
            ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
            for token in ends if isinstance(ends, list) else [ends]:
                if isinstance(token, int):
                    named.setdefault(token, []).append(name)
        return named

    def _find_turn_end(self, named: dict[int, list[str]]) -> int:
        """The token that follows an answer in the template; the tokenizer's EOS where that is no single token."""
        answered = [*chat(PROBE_SYSTEM, PROBE_USER), {"role": "assistant", "content": PROBE_ANSWER}]
        try:
            after = self._render(answered, to_speak=False).rpartition(PROBE_ANSWER)[2].lstrip()
        except Exception:  # as above; a template may know no answers, since none is needed to ask
            after = ""
        ids = self.tokenizer.encode(after, add_special_tokens=False)[:1]
        if ids and (ids[0] in self.tokenizer.all_special_ids or ids[0] in named or self._is_added(ids[0])):
            return ids[0]
        if not named:
            raise UserError(
                f"{self.model}: nothing says which token ends a response: the tokenizer has no eos_token, config.json and "
                "generation_config.json no eos_token_id, and the chat template ends a turn with no special token; set "
                "eos_token in tokenizer_config.json"
            )
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(named)

    def _is_added(self, token: int) -> bool:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).get(token)
        return added is not None and added.special

    def _check_answers(self) -> None:
        """Raises UserError when the tokenizer cannot write an answer, or the model would stop in the middle of one."""
        ids = self.response_ids(PROBE_RESPONSE)
        for token in ids[:-1]:
            if token in self.ends:
                raise UserError(
                    f"{self.model}: {' and '.join(self.ends[token])} names token {token} "
                    f"({self.tokenizer.decode([token])!r}) as the end of a response, but ordinary answers contain it; "
                    "correct eos_token_id there"
                )
        if not RESPONSE_LAYOUT.fullmatch(self.response_text(ids)):
            raise UserError(
                f"{self.model}: its tokenizer does not give back the tags of an answer: {PROBE_RESPONSE!r} becomes "
                f"{self.response_text(ids)!r}; add <think>, </think>, <answer> and </answer> to its vocabulary"
            )


PROBE_SYSTEM, PROBE_USER, PROBE_ANSWER = "Assign the cell types.", "Cell 1: CD3D, MS4A1", "T cell | B cell"
PROBE_RESPONSE = "<think>Cell 1 expresses CD3D.</think>\n<answer>T cell | B cell</answer>"


def system_before_user(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns for a template without a system role: the system message at the head of the user message."""
    if chat[0]["role"] != "system":
        return chat
    system, user, *rest = chat
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
