"""The embedded policy's tokenizer: what one token is."""

import errno

import pytest
from click.testing import CliRunner
from transformers import PreTrainedTokenizerFast

from data.errors import UserError
from data.puzzles import read_puzzles
from launch.create_policy import main
from tests.helpers.commands import succeed
from trainer.model.embedded import Shape, create_policy
from trainer.model.loading import load_tokenizer


def test_words_of_held_out_puzzles_are_tokens_and_their_answers_are_not_read(pipeline, tmp_path):
    train, unseen = pipeline / "puzzles/train.parquet", pipeline / "puzzles/unseen.parquet"
    succeed(
        "create_policy",
        "--puzzles",
        train,
        "--words-of",
        unseen,
        "--out",
        tmp_path / "base",
        "--hidden",
        16,
        "--layers",
        1,
        "--heads",
        2,
        "--kv-heads",
        2,
        "--intermediate",
        16,
    )
    knows, plain = load_tokenizer(str(tmp_path / "base")), load_tokenizer(str(pipeline / "base"))

    def tokens(tokenizer, word: str) -> int:
        return len(tokenizer.encode(" " + word, add_special_tokens=False))

    words = {word for p in read_puzzles(unseen) for word in p.context.split()}
    genes = {gene for p in read_puzzles(unseen) for cell in p.cells for gene in cell}
    assert {"Crohn", "disease."} <= words
    assert all(tokens(knows, word) == 1 for word in words | genes)
    assert tokens(plain, "Crohn") > 1
    text = next(iter(read_puzzles(unseen))).user_message
    assert knows.decode(knows.encode(text)) == text


def test_a_policy_is_written_whole_or_not_at_all(pipeline, tmp_path, monkeypatch):
    """`make demo` takes a folder with config.json for a finished one; transformers writes that file first."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=2, intermediate=16)
    with pytest.raises(UserError, match="No space left"):
        create_policy(str(tmp_path / "base"), ["a b"], {"a"}, {"b"}, shape=shape, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_policy_does_not_replace_a_model(pipeline, tmp_path, monkeypatch):
    before = (pipeline / "base/model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    for out in (pipeline / "base", pipeline / "puzzles/train.parquet", "."):
        done = CliRunner().invoke(main, ["--puzzles", str(pipeline / "puzzles/train.parquet"), "--out", str(out)])
        assert done.exit_code == 2 and "is a file, not empty, or the folder you are in; name another" in done.output
    assert (pipeline / "base/model.safetensors").read_bytes() == before
