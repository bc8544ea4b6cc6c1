"""Checksums of bytes where they are: CRC-32, and a sum that reads memory once.

CRC-32 on a GPU gives the numbers of zlib.crc32, without a copy to main memory. An adapter of rank 256 on a model of 7B has
2.6 GB in float32, and every hand-over takes its checksums.

A CRC is linear: written with XOR for a sum, with w_0 .. w_{n-1} the 4-byte words and Z_k the operator "k zero bytes
follow" on 32 bits,

    crc(w) = Z_4n(w_0) xor Z_4(n-1)(w_1) xor ... xor Z_4(w_{n-1}) xor crc(4n zero bytes)

so the first half of the words, moved on by the length of the second, can be added to it, and again, until one is left.
Zero bytes in front change nothing. (Ross Williams, A painless guide to CRC error detection algorithms, 1993.)
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

POLYNOMIAL = 0xEDB88320
"""Of zlib's CRC-32, the lowest bit first."""
BATCH_WORDS = 1 << 25
"""Words of tensors of one size that are folded side by side: 128 MiB, and about four times that in between."""

COLUMNS = 1021
"""Columns of sum_of_words. A prime: where rows or blocks of a matrix change places, words change columns."""
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integer of as many bits."""
AT_ONCE = (1 << 24) // COLUMNS * COLUMNS
"""Words that are widened at a time: all of them would be 4 GB for the embedding of a 7B model."""

_helper = ThreadPoolExecutor(1, thread_name_prefix="checksums")


def checksums(buffer: Tensor, spans: list[tuple[int, int]]) -> list[int]:
    """zlib.crc32 of buffer[first:end] for each span, computed where the buffer is. buffer: [bytes] uint8."""
    return (device_checksums if buffer.is_cuda else host_checksums)(buffer, spans)


def host_checksums(buffer: Tensor, spans: list[tuple[int, int]]) -> list[int]:
    """The same in main memory. A large buffer uses a second thread: zlib releases the GIL while it computes."""
    data = memoryview(buffer.numpy())
    parts = [data[first:end] for first, end in spans]
    if sum(map(len, parts)) < 1 << 21:
        return [zlib.crc32(part) for part in parts]
    middle = len(parts) // 2
    first = _helper.submit(lambda: [zlib.crc32(part) for part in parts[:middle]])
    second = [zlib.crc32(part) for part in parts[middle:]]
    return first.result() + second


def device_checksums(buffer: Tensor, spans: list[tuple[int, int]]) -> list[int]:
    """The same with the operations of a device (any).

    It waits for the device once, at the end; the first call for a size also copies its tables there.
    """
    sizes = [end - first for first, end in spans]
    order, found = sorted(range(len(spans)), key=lambda i: sizes[i]), []
    for size, alike in groupby(order, key=lambda i: sizes[i]):
        members, n_words = list(alike), max(1, -(-size // 4))
        at_once = max(1, BATCH_WORDS // n_words)
        for start in range(0, len(members), at_once):
            batch = members[start : start + at_once]
            rows = torch.zeros(len(batch), 4 * n_words, dtype=torch.uint8, device=buffer.device)
            for row, i in zip(rows, batch, strict=True):
                row[4 * n_words - size :].copy_(buffer[slice(*spans[i])])
            found.append(_fold(rows.view(torch.int32)))
    # put in the order of the spans here: with their numbers on the device every batch would wait for a copy
    crcs = dict(zip(order, torch.cat(found).tolist(), strict=True)) if found else {}
    return [crcs[i] & 0xFFFFFFFF ^ _of_zeros(size) for i, size in enumerate(sizes)]


def _fold(words: Tensor) -> Tensor:
    """[b,n] int32, which are overwritten -> [b]: the sum of the formula without its last term."""
    while (n := words.shape[1]) > 1:
        half = 1 << ((n - 1).bit_length() - 1)  # the largest power of two below n: one operator per power serves all
        first, words = words[:, : n - half], words[:, n - half :]
        words[:, 2 * half - n :] ^= _moved_on(first, half)
    return _moved_on(words, 1)[:, 0]


def _moved_on(words: Tensor, by: int) -> Tensor:
    """Z_{4 by} of every word. by: a power of two."""
    table, moved = _table(by.bit_length() - 1, words.device), torch.zeros_like(words)
    for byte in range(4):
        which = (words >> 8 * byte & 255) + 256 * byte
        moved ^= table.index_select(0, which.flatten()).view_as(moved)
    return moved


@cache
def _table(power: int, device: torch.device) -> Tensor:
    """[4 * 256] int32: Z_{4 * 2^power} of each value of each byte of a word."""
    columns, values = _operator(power), []
    for byte in range(4):
        of_byte = [0]
        for value in range(1, 256):
            lowest = (value & -value).bit_length() - 1
            of_byte.append(of_byte[value & value - 1] ^ columns[8 * byte + lowest])
        values += of_byte
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).to(device)  # the upper half becomes negative


@cache
def _operator(power: int) -> list[int]:
    """[32] Z_{4 * 2^power} of each single bit."""
    if power:
        half = _operator(power - 1)
        return [_apply(half, column) for column in half]
    columns = [1 << bit for bit in range(32)]
    for _ in range(32):
        columns = [column >> 1 ^ POLYNOMIAL * (column & 1) for column in columns]
    return columns


def _apply(columns: list[int], word: int) -> int:
    found = 0
    for bit, column in enumerate(columns):
        found ^= column * (word >> bit & 1)
    return found


@cache
def _of_zeros(size: int) -> int:
    return zlib.crc32(bytes(size))


def words_of(tensor: Tensor) -> Tensor:
    """The bits of every number, as an integer."""
    return tensor.view(WORDS[tensor.element_size()])


def sum_of_words(flat: Tensor) -> Tensor:
    """[] int64, on the tensor's device: a sum of its words that depends on the place of each. Faster than a CRC, and sees less.

    flat: [n] of any dtype. Words in rows of COLUMNS are added up by column, and the sums multiplied by the odd numbers,
    modulo 2^64. A change of one word always changes it; another order does unless words stay in their columns, or
    those that change places differ in their highest bit only. It is to be compared with that of the same memory: how long a
    word is depends on where the tensor begins.
    """
    size = flat.element_size()
    # words of 8 bytes where the place in memory allows it
    wide = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    parts = [flat.view(torch.int64)] if wide else words_of(flat).split(AT_ONCE)
    sums = torch.zeros(COLUMNS, dtype=torch.int64, device=flat.device)
    for part in parts:
        rows, rest = divmod(len(part), COLUMNS)
        sums += part[: rows * COLUMNS].view(rows, COLUMNS).sum(0, dtype=torch.int64)
        sums[:rest] += part[rows * COLUMNS :]
    return (sums * torch.arange(1, 2 * COLUMNS, 2, device=flat.device)).sum()
