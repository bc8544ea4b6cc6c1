"""The embedded policy's tokenizer: what one token is."""

from data.puzzles import read_puzzles
from tests.helpers.commands import succeed
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
