"""What CPUs without the wider instructions do otherwise."""

import pytest
import torch

AVX2 = pytest.mark.xfail(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="with AVX2 torch's kernels round otherwise at the edges of a slab: the last bits depend on the threads",
    strict=False,
)
NO_BF16 = pytest.mark.xfail(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="without instructions for bf16 torch convolves by another way, which takes other memory",
    strict=False,
)
