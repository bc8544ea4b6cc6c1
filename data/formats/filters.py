"""Compression filters of HDF5 files: which ones a file needs, and whether they are installed.

A filter has a number: https://github.com/HDFGroup/hdf5_plugins/blob/master/docs/RegisteredFilterPlugins.md
"""

import functools
import importlib
from typing import Any

import h5py

FILTERS = {
    4: "szip",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32018: "fcidecomp",
    32024: "sz3",
    32026: "blosc2",
    32028: "sperr",
}
"""Number of a filter -> its name. Numbers of other filters are shown alone."""
MAX_DEPTH = 8
"""Groups within groups that are searched; a group of a damaged file may hold itself."""


def missing_filters(dataset: h5py.Dataset) -> list[int]:
    """The numbers of a dataset's filters that are not installed."""
    made = dataset.id.get_create_plist()
    numbers = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
    return [number for number in numbers if not h5py.h5z.filter_avail(number)]


@functools.cache
def load_plugins() -> bool:
    """Register the filters of the package hdf5plugin, if it is installed. Returns whether it is."""
    try:
        importlib.import_module("hdf5plugin")
    except ImportError:
        return False
    return True


def ensure_filters(node: Any) -> None:
    """Register hdf5plugin's filters when a dataset needs a filter that is not there yet."""
    if isinstance(node, h5py.Dataset) and missing_filters(node):
        load_plugins()


def filter_sentence(file: h5py.File) -> str | None:
    """What to do about the filters that a file needs and that are not installed. None when there are none.

    Every dataset of the file is looked at, so this is for files that could not be read.
    """
    missing = sorted(_missing_below(file))
    if not missing:
        return None
    named = [f"{number} ({FILTERS[number]})" if number in FILTERS else str(number) for number in missing]
    several = len(named) > 1
    # a package that is installed already, and does not know the filter, is no remedy
    install = "" if load_plugins() else "pip install hdf5plugin (it is then found by itself), or "
    return (
        f"is compressed with the HDF5 filter{'s' if several else ''} {', '.join(named)}, which "
        f'{"are" if several else "is"} not installed; {install}re-save the file with compression="gzip"'
    )


def _missing_below(group: h5py.Group, depth: int = 0) -> set[int]:
    """The missing filters of all datasets in a group and its groups. What is damaged is passed over."""
    missing: set[int] = set()
    try:
        for name in group:
            node = group.get(name)  # None for a link that leads nowhere
            if isinstance(node, h5py.Dataset):
                missing |= set(missing_filters(node))
            elif isinstance(node, h5py.Group) and depth < MAX_DEPTH:
                missing |= _missing_below(node, depth + 1)
    except (KeyError, OSError, RuntimeError, ValueError):
        pass
    return missing
