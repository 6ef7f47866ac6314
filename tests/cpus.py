"""What CPUs without the wider instructions do otherwise."""

import pytest
import torch

AVX2 = pytest.mark.xfail(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="known fault, AMD EPYC with AVX2 alone, cause not found: last bits depend on the threads",
    strict=False,
)
