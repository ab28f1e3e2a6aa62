from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.maths.packing import awq_deinterleave, pack, pack_awq_rows, unpack, words_for


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 32), (2, 33), (4, 96), (1, 131)])
def test_words_hold_the_bit_string(bits: int, shape: tuple[int, int]) -> None:
    """Each row, written as one little-endian integer, is the sum of its codes shifted to their places."""
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (shape[0], words_for(shape[1], bits))
    for row in range(shape[0]):
        expected = sum(int(code) << (bits * place) for place, code in enumerate(codes[row]))
        found = int.from_bytes(words[row].numpy().astype(np.int32).tobytes(), "little")
        assert found == expected
    assert torch.equal(unpack(words, bits, shape[1]), codes)


def test_one_worked_example() -> None:
    # nibbles 1 ... 8, low bits first, are the hexadecimal word 87654321
    assert pack(torch.arange(1, 9).view(1, 8), 4).item() == 0x87654321 - 2**32
    assert pack_awq_rows(torch.arange(1, 9, dtype=torch.uint8).view(8, 1)).item() == 0x86427531 - 2**32


def test_awqs_words_give_the_codes_back() -> None:
    codes = torch.randint(0, 16, (24, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    words = pack_awq_rows(codes)
    assert words.shape == (5, 3)
    assert torch.equal(awq_deinterleave(unpack(words, 4, 24)), codes.T)
