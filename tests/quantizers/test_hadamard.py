"""Block Hadamard transforms against SciPy's matrices."""

import numpy as np
import pytest
import torch

from beyond_outliers.quantizers import (
    hadamard_block,
    hadamard_matrix,
    hadamard_transform,
)


@pytest.mark.parametrize("width, block", [(64, 64), (96, 32), (128, 128), (384, 128), (1024, 128), (7, 1)])
def test_hadamard(width, block):
    from scipy.linalg import hadamard

    assert hadamard_block(width) == block
    matrix = np.kron(np.eye(width // block), hadamard(block) / np.sqrt(block))
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotated = hadamard_transform(x)
    np.testing.assert_allclose(rotated.numpy(), x.numpy() @ matrix, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(rotated), x)


def test_a_matrix_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        hadamard_transform(torch.ones(2, 2, dtype=torch.float64))
    assert not hadamard_matrix(2, torch.float64, torch.device("cpu")).is_inference()
