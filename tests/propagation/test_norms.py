"""Norms against NumPy."""

import numpy as np
import pytest
import torch

from beyond_outliers.propagation import spectral_norm


def test_spectral_norm():
    generator = np.random.default_rng(0)
    for shape in ((5, 9), (9, 5), (1, 4)):
        weight = generator.normal(size=shape)
        assert spectral_norm(torch.from_numpy(weight)) == pytest.approx(np.linalg.svd(weight)[1][0], rel=1e-12)
