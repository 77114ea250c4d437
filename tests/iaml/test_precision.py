"""What networks compute in."""

import pytest
import torch
from torch.nn import functional as F

from iaml.precision import autocast, multiplies_bf16_fast

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "is_fast"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx512_bf16": False, "avx2": True}, False),
        ({}, False),
    ],
)
def test_a_cpu_with_instructions_for_bf16_multiplies_it_fast(monkeypatch, found, is_fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert multiplies_bf16_fast(CPU) == is_fast
    assert type_computed_in("auto") == (torch.bfloat16 if is_fast else torch.float32)
    assert type_computed_in("float32") == torch.float32
    assert type_computed_in("bf16") == torch.bfloat16


def type_computed_in(precision):
    with autocast(CPU, precision):
        return F.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype
