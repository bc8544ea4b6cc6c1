"""HDF5 files on disks that have no locks, such as NFS in many containers. What anndata itself opens still needs
HDF5_USE_FILE_LOCKING=FALSE there.
"""

import errno
import re
from pathlib import Path
from typing import Any

import h5py

HELD = (errno.EAGAIN, errno.EACCES)
"""What the system says of a lock that another program holds. Anything else means that the disk has none."""


def open_hdf5(path: Path, mode: str, **more: Any) -> h5py.File:
    """h5py.File, without a lock where the disk has none. HDF5 itself goes on without one only for one kind of such disks.

    Raises OSError as h5py does. Our commands hold the lock of their folder beside (data/files.py).
    """
    try:
        return h5py.File(path, mode, **more)
    except OSError as error:
        if not lacks_locks(str(error)):
            raise
        return h5py.File(path, mode, locking=False, **more)


def lacks_locks(reason: str) -> bool:
    """Could a file not be opened for want of locks, and not since another program has it open? reason: of h5py.

    >>> lacks_locks("(unable to lock file, errno = 37, error message = 'No locks available')")
    True
    >>> lacks_locks("(unable to lock file, errno = 11, error message = 'Resource temporarily unavailable')")
    False
    """
    number = re.search(r"unable to lock file, errno = (\d+)", reason)
    return number is not None and int(number[1]) not in HELD
