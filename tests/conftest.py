"""For all tests: the same random numbers whatever the order, and a visible skip of those that cannot run here."""

import os
import random

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("tests", derandomize=True, database=None, deadline=None, max_examples=50)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, a run of its own: see make test"))
