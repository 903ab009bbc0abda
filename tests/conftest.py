"""Settings shared by every test: deterministic property tests, one torch thread, fixed seeds."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state and on one thread, whatever ran before it. (A forked process waits
    for OpenMP's threads, which the fork left behind.)"""
    torch.manual_seed(0)
    torch.set_num_threads(1)
