"""Recognise, by content, the files and folders that people give instead of an .h5ad file.

Names are not trusted: a web page that was saved as atlas.h5ad is a web page. Signatures:
https://www.loc.gov/preservation/digital/formats/ and the file(1) magic database; R: "R Internals", section 1.8.
"""

import bz2
import lzma
import shlex
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from data.formats.foreign import ADD_OBS, ForeignKind, h5ad_name

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEAD_BYTES = 1 << 16
"""Bytes of the file that are looked at."""
BZIP2_BYTES = 1 << 20
"""At least one block of bzip2."""
UNPACKED_BYTES = 1 << 18
"""Bytes of a compressed file that are looked at, after decompression."""
NO_SIGNATURE = "not an .h5ad file (no HDF5 signature)"
RDS_HEADS = (b"X\n\x00\x00", b"A\n2\n", b"A\n3\n", b"B\n")
"""Serialisations of R: XDR, text and native binary."""
RDA_HEADS = (b"RDX2\n", b"RDX3\n", b"RDA2\n", b"RDA3\n", b"RDB2\n", b"RDB3\n")
PACKERS = {
    b"\x1f\x8b": ("gzip-compressed", "gunzip -c"),
    b"BZh": ("bzip2-compressed", "bunzip2 -c"),
    b"\xfd7zXZ\x00": ("xz-compressed", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "zstd -dc"),
}
"""Signature of a compressed file -> (what it is, the command that unpacks it)."""
SIGNATURES = {
    b"PAR1": ("a Parquet table", "read it with pandas.read_parquet"),
    b"ARROW1": ("a Feather (Arrow) table", "read it with pandas.read_feather"),
    b"FEA1": ("a Feather table", "read it with pandas.read_feather"),
    b"\x93NUMPY": ("a NumPy array (.npy)", "read it with numpy.load"),
}
"""Signature of a table without a place for cells' and genes' names together -> (what it is, how to read it)."""
ARCHIVES = {b"Rar!": "a RAR archive", b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive"}
CENSUS_MARKS = ("__tiledb_group.tdb", "__group", "__tiledb_group")


def foreign_file(path: Path) -> ForeignKind | None:
    """The kind of a file that is not HDF5, from its first bytes. None for HDF5, also behind a user block."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(HDF5_SIGNATURE) or _has_user_block(path):
        return None
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _zip_kind(path)
    for signature, (what, command) in PACKERS.items():
        if head.startswith(signature):
            if signature == b"BZh":  # a block of bzip2 can only be unpacked as a whole
                with open(path, "rb") as file:
                    head = file.read(BZIP2_BYTES)
            inner = _unpacked(head, signature)
            return _compressed_kind(inner, path, what, command)
    return _plain_kind(head, path) or ForeignKind(
        "a file of an unknown kind", "give the .h5ad file itself, or convert the file with anndata", NO_SIGNATURE
    )


def _has_user_block(path: Path) -> bool:
    """Whether HDF5 begins at a later power of two, as in .h5mu and MATLAB files."""
    with open(path, "rb") as file:
        for offset in (512, 1024, 2048, 4096, 8192):
            file.seek(offset)
            if file.read(8) == HDF5_SIGNATURE:
                return True
    return False


def _unpacked(head: bytes, signature: bytes) -> bytes:
    """The first bytes of what a compressed file holds; empty when they cannot be unpacked."""
    makers: dict[bytes, Callable] = {
        b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
        b"BZh": bz2.BZ2Decompressor,
        b"\xfd7zXZ\x00": lzma.LZMADecompressor,
    }
    if signature not in makers:
        return b""
    try:
        return makers[signature]().decompress(head, UNPACKED_BYTES)
    except (zlib.error, OSError, lzma.LZMAError, EOFError):
        return b""


def _compressed_kind(inner: bytes, path: Path, what: str, command: str) -> ForeignKind:
    """The kind of a compressed file. R, Matrix Market and tables are read compressed, so they are named themselves."""
    known = _plain_kind(inner, path) if inner else None
    if known is not None and not known.what.startswith("is a tar"):
        return known
    if known is not None:
        return ForeignKind(
            "a compressed tar archive", f"unpack it first (tar -xf {shlex.quote(path.name)})", "is a tar archive"
        )
    target = h5ad_name(path)
    return ForeignKind(
        what, f"unpack it first ({command} {shlex.quote(path.name)} > {shlex.quote(target)})", f"is {what}"
    )


def _plain_kind(head: bytes, path: Path) -> ForeignKind | None:
    """The kind of a file from its first bytes, or None when they are not known here."""
    write = f'save it with .write_h5ad("{h5ad_name(path)}")'
    if head.startswith(RDS_HEADS):
        return _rds_kind(head, path)
    if head.startswith(RDA_HEADS):
        return ForeignKind(
            "an R workspace (.rda, .RData)",
            f'in R, load("{path.name}") and write its Seurat object: {_to_h5ad_in_r("OBJECT", path)}',
        )
    if head.startswith(b"\x0b\x0e\x0a\x0c") or head.startswith(b"\x0b\x0e\x0a\xc1"):
        return ForeignKind(
            "an R object of the package qs", f"in R: {_to_h5ad_in_r(f'qs::qread({_quoted(path)})', path)}"
        )
    for signature, (kind, reader) in SIGNATURES.items():
        if head.startswith(signature):
            return ForeignKind(kind, f"{reader}, make an anndata.AnnData of it, {ADD_OBS} and {write}")
    for signature, kind in ARCHIVES.items():
        if head.startswith(signature):
            return ForeignKind(kind, "unpack it first", f"is {kind}")
    if head[257:262] == b"ustar":
        return ForeignKind("a tar archive", f"unpack it first (tar -xf {shlex.quote(path.name)})", "is a tar archive")
    if head.startswith(b"%PDF"):
        return ForeignKind("a PDF document", "download the data file itself, not the paper")
    if head.startswith((b"\xd0\xcf\x11\xe0", b"{\\rtf")):
        return ForeignKind("a document of Microsoft Office", "export the table as .csv and convert that with anndata")
    if head.startswith((b"BAM\x01", b"CRAM")):
        return ForeignKind("a file of aligned reads", "count its genes first, for example with Cell Ranger or STARsolo")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return ForeignKind("a Python pickle", f"load it with pickle.load in Python, and {write} if it is an AnnData")
    if len(head) >= 4096 and not head[:4096].strip(b"\x00"):
        return ForeignKind(
            "a file that begins with zeros", "it was not downloaded to its end, so download it again", NO_SIGNATURE
        )
    return _text_kind(head, path, write)


def _rds_kind(head: bytes, path: Path) -> ForeignKind:
    """An R object; its class is only known when it stands in the first bytes."""
    if b"SingleCellExperiment" in head:
        write = f'zellkonverter::writeH5AD(readRDS({_quoted(path)}), "{h5ad_name(path)}")'
        return ForeignKind("an R object (.rds) of class SingleCellExperiment", f"in R: {write}")
    return ForeignKind(
        "an R object (.rds)",
        f"in R, if it is a Seurat object: {_to_h5ad_in_r(f'readRDS({_quoted(path)})', path)}",
    )


def _to_h5ad_in_r(expression: str, path: Path) -> str:
    write = f'zellkonverter::writeH5AD(as.SingleCellExperiment({expression}), "{h5ad_name(path)}")'
    return f"library(Seurat); {write}"


def _quoted(path: Path) -> str:
    return f'"{path.name}"'


def _text_kind(head: bytes, path: Path, write: str) -> ForeignKind | None:
    """The kind of a text file, or None when the bytes are no text."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = head[: len(head) // 2 * 2].decode("utf-16", errors="replace")
    elif b"\x00" in head:
        return None
    else:
        text = head.decode("utf-8-sig", errors="replace")
    if not text or text.count("\ufffd") > 0.02 * len(text) or sum(c < " " and c not in "\t\r\n\f" for c in text) > 3:
        return None
    start = text.lstrip()[:2000].lower()
    if start.startswith("%%matrixmarket"):
        return ForeignKind(
            "a Matrix Market matrix (.mtx)",
            f"read its folder with scanpy.read_10x_mtx (genes and barcodes stand in files beside it), {ADD_OBS} and "
            f"{write}",
        )
    if start.startswith(("<!doctype html", "<html", "<head", "<script")) or "<html" in start:
        return ForeignKind("a web page (HTML)", "download the data file itself: this is the page that links to it")
    if start.startswith("<?xml") or start.startswith("<error"):
        return ForeignKind("an XML text, such as a server's error message", "open it to read why, and download again")
    if start.startswith("version https://git-lfs"):
        return ForeignKind(
            "a pointer of Git LFS, not the data", f"fetch the data with: git lfs pull -I {shlex.quote(path.name)}"
        )
    if start.startswith(("{", "[")):
        return ForeignKind("a JSON text, such as a server's answer", "open it to read why, and download the data file")
    lines = [line for line in text.splitlines() if line.strip()][:4]
    for delimiter, name, argument in (("\t", "TSV", ', delimiter="\\t"'), (",", "CSV", ""), (";", "CSV", ', ";"')):
        if lines and min(line.count(delimiter) for line in lines[:2]) >= 1:
            return ForeignKind(
                f"a table of text ({name})",
                f'read it with anndata.io.read_csv("{path.name}"{argument}) (and .T, when genes are its rows), {ADD_OBS} '
                f"and {write}",
                f"{NO_SIGNATURE} but a table of text ({name})",
            )
    return ForeignKind("a text file", "give the .h5ad file itself", f"{NO_SIGNATURE} but a text file")


def _zip_kind(path: Path) -> ForeignKind:
    """The kind of a zip archive that is no zarr store."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return ForeignKind(
            "a zip archive that is cut short", "download it again", "is a zip archive that is cut short or damaged"
        )
    if "[Content_Types].xml" in names:
        return ForeignKind("a document of Microsoft Office", "export the table as .csv and convert that with anndata")
    if names and all(name.endswith(".npy") for name in names):
        return ForeignKind(
            "an archive of NumPy arrays (.npz)",
            f"read it with scipy.sparse.load_npz, make an anndata.AnnData of it, {ADD_OBS} and save it as .h5ad",
        )
    inside = next((name for name in names if name.endswith((".h5ad", ".zarr/"))), None)
    return ForeignKind(
        "a zip archive", f"unpack it first (unzip {shlex.quote(path.name)})" + (f": it holds {inside}" if inside else ""),
        "is a zip archive",
    )  # fmt: skip


def foreign_folder(path: Path) -> ForeignKind:
    """The kind of a folder that is no zarr store."""
    names = {entry.name for entry in path.iterdir()}
    plain = {name.removesuffix(".gz") for name in names}
    write = f'save it with .write_h5ad("{path.name}.h5ad")'
    if any(name.endswith("matrix.mtx") for name in plain):
        return ForeignKind(
            "a folder of 10x Genomics (matrix.mtx, barcodes, features)",
            f'read it with scanpy.read_10x_mtx("{path.name}"), {ADD_OBS} and {write}',
        )
    if names & set(CENSUS_MARKS):
        return ForeignKind(
            "a TileDB-SOMA experiment", f'write it with tiledbsoma.io.to_h5ad(experiment, "{path.name}.h5ad", "RNA")'
        )
    if "se.rds" in names:
        loaded = f'HDF5Array::loadHDF5SummarizedExperiment("{path.name}")'
        return ForeignKind(
            "an HDF5 SummarizedExperiment of R",
            f'in R: zellkonverter::writeH5AD({loaded}, "{path.name}.h5ad")',
        )
    if {"storage_order", "version"} <= names:
        return ForeignKind(
            "a matrix of BPCells", "in R: write the Seurat object that uses it as .h5ad, not this folder"
        )
    files = sorted(name for name in names if name.endswith((".h5ad", ".zarr", ".h5")))
    inside = f", for example {path.name}/{files[0]}" if files else ""
    what = "is a directory, not an .h5ad file"
    return ForeignKind("a directory", f"name the file itself{inside}, or save it as .h5ad", what)
