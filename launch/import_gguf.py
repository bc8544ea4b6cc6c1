"""Make a Hugging Face checkpoint of a GGUF file, so that a model without a hub can be trained here.

pip install gguf
python launch/import_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --out checkpoints/smollm2
python launch/check_model.py checkpoints/smollm2
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from launch.options import argument, command, option


@dataclass(frozen=True, kw_only=True)
class ImportGgufConfig:
    file: str = argument("A .gguf file.")
    out: str = option(MISSING, "Folder of the checkpoint to write.")


@command(ImportGgufConfig)
def main(config: ImportGgufConfig) -> None:
    """Write the checkpoint of a GGUF file: weights in float32, tokenizer, chat template, ends of a turn."""
    from trainer.model.from_gguf import import_gguf  # transformers takes seconds to load

    weights, notes = import_gguf(Path(config.file), Path(config.out))
    said = [f"wrote {config.out}: {weights:,} weights in float32", *(f"note: {note}" for note in notes)]
    print("\n".join(said))


if __name__ == "__main__":
    main()
