"""A checkpoint's response ends after a text, though its engine knows tokens only. The engine here is scripted."""

from data.distill.distill import Request
from data.distill.meter import Meter
from data.puzzles import Puzzle
from rollout import Rollout, Sampling
from rollout.teachers.vllm import VLLMTeacher

PIECES = ["\0", *map(chr, range(32, 127)), "\n", "> ", "l>", "l> "]
"""Tokens: the end of a turn, single characters, and some that hold the end of a tag and more."""
END = 0


class Tokens:
    """A tokenizer, and the format of a model that uses it."""

    def __init__(self) -> None:
        self.tokenizer, self.vocabulary = self, len(PIECES)

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate([*PIECES, "<image>"])}  # the last has no row in the model

    def decode(self, ids: list[int]) -> str:
        return "".join(PIECES[i] for i in ids if i != END)

    def prompt_ids(self, turns: list[dict[str, str]]) -> list[int]:
        return [PIECES.index(char) for char in turns[1]["content"][-6:]]

    def response_text(self, ids: list[int]) -> str:
        return self.decode(ids)


class Engine:
    """It says the rest of what it has in mind for a prompt, up to a stop token or the limit."""

    def __init__(self, minds: dict[str, list[int]]) -> None:
        """minds: {puzzle id: tokens}"""
        self.minds, self.calls = minds, []

    def generate(self, names: list[str], prompts: list[list[int]], sampling: Sampling) -> list[list[Rollout]]:
        self.calls.append((names, sampling))
        assert max(sampling.stop_ids) < len(PIECES)  # as vLLM does from 0.29 on
        groups = []
        for name, ids in zip(names, prompts, strict=True):
            rest = self.minds[name][len(ids) - 6 :][: sampling.max_tokens]
            end = next((i for i, token in enumerate(rest, 1) if token in sampling.stop_ids), len(rest))
            said = rest[:end]
            reason = "stop" if said[-1] in sampling.stop_ids else "length"
            groups.append(
                [
                    Rollout(
                        puzzle_id=name,
                        prompt_ids=ids,
                        response_ids=said,
                        sampler_logprobs=[-float(token) for token in said],
                        finish_reason=reason,
                        adapter_version=0,
                        adapter_hash="",
                    )
                ]
            )
        return groups

    def close(self) -> None:
        pass


def tokens(text: str) -> list[int]:
    """The longest token first, as a tokenizer does."""
    ids = []
    while text:
        piece = max((p for p in PIECES if text.startswith(p)), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


def sampled(texts: list[str], stop: str, max_tokens: int = 60) -> tuple[list, Engine, Meter]:
    """(completions, engine, meter) of a request for each text that the model has in mind."""
    minds = {f"p{i}": [*tokens(text), END] for i, text in enumerate(texts)}
    engine, meter = Engine(minds), Meter()
    sampling = Sampling(n=1, max_tokens=max_tokens, temperature=1.0, top_p=1.0, seed=0, stop_ids=(END,))
    teacher = VLLMTeacher(engine, Tokens(), sampling, 8, "m", meter)
    puzzles = [
        Puzzle(id=name, context="c", cells=[["A"], ["B"]], candidates=["x", "y"], answer=["x", "y"]) for name in minds
    ]
    return list(teacher.sample([Request(puzzle=p, attempt=0, stop=stop) for p in puzzles])), engine, meter


def test_a_response_ends_after_the_text_and_goes_on_after_other_tags():
    texts = [
        "<b>hm</b> <call>markers(A)</call> and more",
        "<think>x</think><answer>y</answer>",
        "no tag at all",
        "<call>markers(B)</call>",
    ]
    done, engine, meter = sampled(texts, "</call>")
    assert [c.text for c in done] == [
        "<b>hm</b> <call>markers(A)</call> ",  # its last token holds a blank beyond the text
        "<think>x</think><answer>y</answer>",
        "no tag at all",
        "<call>markers(B)</call>",
    ]
    assert {c.finish_reason for c in done} == {"stop"} and [c.puzzle_id for c in done] == ["p0", "p1", "p2", "p3"]
    assert engine.calls[0][0] == ["p0", "p1", "p2", "p3"] and engine.calls[-1][0] == ["p1"], (
        "only what goes on is asked"
    )
    assert [c.completion_tokens for c in done][1] == len(tokens(texts[1])) + 1
    assert meter.prompt_tokens == 4 * 6, "a prompt counts once, however often its response was continued"
    seeds = [sampling.seed for _, sampling in engine.calls]
    assert len(set(seeds)) == len(seeds), "the same seed would draw the same numbers again"


def test_without_a_text_the_engine_is_asked_once():
    done, engine, _ = sampled(["a <call>x</call> b", "c"], "")
    assert [c.text for c in done] == ["a <call>x</call> b", "c"]
    assert len(engine.calls) == 1 and engine.calls[0][1].stop_ids == (END,)


def test_the_limit_holds_over_all_parts():
    """Twelve tokens, whatever the tags are; what is cut says so."""
    (cut,), engine, _ = sampled(["<a><b><c><d><e><f>"], "</call>", max_tokens=12)
    assert cut.text == "<a><b><c><d>" and cut.finish_reason == "length" and cut.completion_tokens == 12
    assert [sampling.max_tokens for _, sampling in engine.calls] == [12, 9, 6, 3]
    # a long one beside one that ended: it is not cut early by the other's shorter rest
    done, _, _ = sampled(["<a>" + "b" * 40, "<c><d>" + "e" * 40], "</call>", max_tokens=30)
    assert [len(c.text) for c in done] == [30, 30] and {c.finish_reason for c in done} == {"length"}


def test_requests_of_two_kinds_are_sampled_apart():
    minds = {"p0": [*tokens("<a>b"), END], "p1": [*tokens("<a>b"), END]}
    engine = Engine(minds)
    sampling = Sampling(n=1, max_tokens=20, temperature=1.0, top_p=1.0, seed=0, stop_ids=(END,))
    teacher = VLLMTeacher(engine, Tokens(), sampling, 8, "m", Meter())
    puzzles = [
        Puzzle(id=name, context="c", cells=[["A"], ["B"]], candidates=["x", "y"], answer=["x", "y"]) for name in minds
    ]
    requests = [Request(puzzle=p, attempt=0, stop=s) for p, s in zip(puzzles, ("</call>", ""), strict=True)]
    assert [c.text for c in teacher.sample(requests)] == ["<a>b", "<a>b"]
    assert [names for names, _ in engine.calls] == [["p0"], ["p0"], ["p1"]]
