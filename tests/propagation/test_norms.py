"""Norms against NumPy, and the thread that they run on."""

import numpy as np
import pytest
import torch

from beyond_outliers.passes import one_thread
from beyond_outliers.propagation import spectral_norm


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (130, 200), (200, 130)])
def test_spectral_norm(shape):
    weight = np.random.default_rng(0).normal(size=shape)
    expected = pytest.approx(np.linalg.svd(weight)[1][0], rel=1e-12)
    assert spectral_norm(torch.from_numpy(weight)) == expected
    assert spectral_norm(torch.zeros(shape)) == 0


def test_one_thread_is_a_matter_of_the_block(monkeypatch):
    seen, eigenvalues = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: seen.append(torch.get_num_threads()) or eigenvalues(x))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        spectral_norm(torch.eye(3))
        assert seen == [1] and torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
