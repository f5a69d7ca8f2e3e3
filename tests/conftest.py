"""Settings for all tests: one thread, because the networks are too small for more; no GPU tests without a GPU.

Most tests train for a few batches on purpose, of which `STNCallback` warns.
"""

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:This run of .* has .* hyperparameter steps")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
