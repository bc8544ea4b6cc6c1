"""Recognise HDF5 files, and zarr stores, of other programs by the groups they hold."""

from pathlib import Path
from typing import Any

from data.formats.foreign import ADD_OBS, ForeignKind, h5ad_name
from data.formats.stores import is_group


def foreign_layout(file: Any, path: Path) -> ForeignKind | None:
    """The kind of an open file that does not hold the tables of an AnnData. None when its layout is not known.

    file: an h5py.File, or the root of a zarr store.
    """
    names = {name for name in file if isinstance(name, str)}
    target = h5ad_name(path)
    write = f'save it with .write_h5ad("{target}")'
    attributes = set(file.attrs)
    if {"matrix", "row_attrs", "col_attrs"} <= names:
        reading = f'anndata.io.read_loom("{path.name}").write_h5ad("{target}")'
        return ForeignKind("a loom file", f"convert it in Python (pip install loompy): {reading}")
    if "mod" in names or _text(file.attrs.get("encoding-type")).lower() == "mudata":
        return _mudata(file, path, target)
    if {"assays", "cell.names"} <= names or {"active.assay", "project"} & attributes:
        return ForeignKind("an h5Seurat file", f'convert it in R: SeuratDisk::Convert("{path.name}", dest = "h5ad")')
    if "molecule_info" in names or {"barcode_idx", "umi"} & names:
        return ForeignKind(
            "a molecule_info.h5 of Cell Ranger", "use filtered_feature_bc_matrix.h5 of the same run instead"
        )
    if _is_10x(file, names):
        return ForeignKind(
            "a 10x Genomics matrix (.h5)", f'read it with scanpy.read_10x_h5("{path.name}"), {ADD_OBS} and {write}'
        )
    if "spatialdata_attrs" in attributes or {"tables", "table"} & names:
        tables = next((name for name in ("tables", "table") if name in names), "tables")
        held = sorted(file[tables]) if is_group(file.get(tables)) else []
        named = f"{path.name}/{tables}/{held[0]}" if held else "one of its tables"
        return ForeignKind("a SpatialData store", f"give a table of it: {named}")
    if {"multiscales", "ome"} & attributes:
        return ForeignKind("an image (OME-Zarr)", "give the table of cells that belongs to it")
    if "#refs#" in names:
        return ForeignKind("a MATLAB file", f"read it with h5py, make an anndata.AnnData of it and {write}")
    return None


def _is_10x(file: Any, names: set[str]) -> bool:
    """Whether a file is a count matrix of Cell Ranger 3 (/matrix), or of Cell Ranger 2 (one group per genome)."""
    groups = [group for name in names if is_group(group := file.get(name))]  # a broken link gives None
    return any(
        {"barcodes", "data", "indices", "indptr"} <= set(group) and {"features", "genes", "gene_names"} & set(group)
        for group in groups
    )


def _mudata(file: Any, path: Path, target: str) -> ForeignKind:
    """A MuData file: its modalities, and how one of them becomes an .h5ad file."""
    modalities = sorted(file["mod"]) if is_group(file.get("mod")) else []
    genes = next((name for name in modalities if name.lower() in ("rna", "gex", "gene expression")), None)
    chosen = genes or (modalities[0] if modalities else "rna")
    reader = "read_zarr" if path.is_dir() or path.suffix == ".zip" else "read_h5mu"
    return ForeignKind(
        f"a MuData file with the modalities {', '.join(map(repr, modalities)) or 'none'}",
        f'write one of them as .h5ad in Python: mudata.{reader}("{path.name}")["{chosen}"].write_h5ad("{target}")',
    )


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
