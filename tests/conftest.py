"""Settings and data that all tests share."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same cases in every run, so that a red run means a changed library; a nightly run
# looks for new ones with HYPOTHESIS_PROFILE=explore.
_quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "fixed", deadline=None, max_examples=40, derandomize=True, suppress_health_check=_quiet
)
settings.register_profile(
    "explore", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=_quiet
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    """One thread (pytest-xdist uses the cores) and one seed for every test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Real data: 1797 images of digits (n, 1, 8, 8) in [0, 1], float64, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float64)[:, None] / 16.0
    return images, torch.as_tensor(data.target, dtype=torch.long)
