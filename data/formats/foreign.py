"""What a kind of file is called, and the one thing to do with it."""

import re
from dataclasses import dataclass
from pathlib import Path

ADD_OBS = "add the cell types (to annotate: clusters) and donors to its .obs"
"""Remedy for files that hold a matrix without labels."""


@dataclass(frozen=True)
class ForeignKind:
    """A kind of file that is not read here."""

    kind: str
    """With its article: "a loom file"."""
    remedy: str
    """What to do, as an order: "unpack it first"."""
    what: str = ""
    """How the sentence begins; default: "is KIND, not an .h5ad file"."""

    @property
    def sentence(self) -> str:
        """What follows the path in a message."""
        return f"{self.what or f'is {self.kind}, not an .h5ad file'}; {self.remedy}"


def h5ad_name(path: Path) -> str:
    """The name of the .h5ad file that is made of a file: never that of the file itself."""
    unpacked = re.sub(r"\.(gz|bz2|xz|zst)$", "", path.name)
    name = f"{unpacked.rpartition('.')[0] or unpacked}.h5ad"
    return name if name != path.name else f"{path.stem}-converted.h5ad"
