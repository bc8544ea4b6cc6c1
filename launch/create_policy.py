"""The embedded policy: a small random Qwen2-architecture checkpoint whose tokenizer knows the puzzles' genes.

python launch/create_policy.py --puzzles train.parquet --puzzles traces.jsonl --out base
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from data.atlas.markers import read_markers
from data.errors import UserError
from data.options import check_numbers
from data.prompts import CANDIDATES_HEAD, SYSTEM_MESSAGE
from data.puzzles import read_puzzles
from launch.options import command, option


@dataclass(frozen=True, kw_only=True)
class CreatePolicyConfig:
    puzzles: tuple[str, ...] = option((), "Puzzle or trace files that the tokenizer is trained on; repeatable.")
    words_of: tuple[str, ...] = option(
        (), "Puzzle files whose genes and context words become tokens too; their answers are not read; repeatable."
    )
    out: str = option(dataclasses.MISSING, "Checkpoint folder to write.")
    hidden: int = option(128, "Hidden size.")
    layers: int = option(3, "Transformer layers.")
    heads: int = option(4, "Attention heads.")
    kv_heads: int = option(4, "Key/value heads.")
    intermediate: int = option(384, "MLP size.")
    seed: int = option(0, "Seed of the weights.")

    def __post_init__(self) -> None:
        check_numbers(self, {"at least 1": ("hidden", "layers", "heads", "kv_heads", "intermediate")})
        if self.hidden % (2 * self.heads):  # rotary embeddings turn pairs of dimensions
            raise UserError(f"--hidden {self.hidden}: must be a multiple of {2 * self.heads}, twice --heads")
        if self.heads % self.kv_heads:
            raise UserError(f"--heads {self.heads}: must be a multiple of --kv-heads {self.kv_heads}")


@command(CreatePolicyConfig)
def main(config: CreatePolicyConfig) -> None:
    """Make a model and its tokenizer from scratch; nothing is downloaded."""
    if not config.puzzles:
        raise UserError("--puzzles: name at least one puzzle file, whose words the tokenizer learns")
    if Path(config.out).is_file() or Path(config.out).resolve() == Path.cwd() or any(Path(config.out).glob("*")):
        raise UserError(f"--out {config.out}: is a file, not empty, or the folder you are in; name another folder")
    puzzles = [puzzle for path in config.puzzles for puzzle in read_puzzles(path)]
    named = [puzzle for path in config.words_of for puzzle in read_puzzles(path)]

    # torch and transformers take seconds to load: not before the files are known to be good
    from trainer.model.embedded import Shape, create_policy

    texts = {text for p in puzzles for text in (p.user_message, p.system_message, p.to_row()["assistant_msg"])}
    words = {gene for puzzle in (*puzzles, *named) for cell in puzzle.cells for gene in cell}
    words |= {word for puzzle in named for word in puzzle.context.split()}
    words |= {gene for entry in read_markers().values() for gene in entry.markers}
    shape = Shape(
        hidden=config.hidden,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        intermediate=config.intermediate,
    )
    phrases = {SYSTEM_MESSAGE, CANDIDATES_HEAD.strip(), *(label for p in puzzles for label in p.candidates)}
    n_parameters = create_policy(config.out, sorted(texts), words, phrases, shape=shape, seed=config.seed)
    print(f"{config.out}: {n_parameters / 1e6:.1f} M parameters, random weights")


if __name__ == "__main__":
    main()
