"""What a kind of file is called, and the one thing to do with it."""

from dataclasses import dataclass

ADD_OBS = "add the cell types and donors to its .obs"
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
