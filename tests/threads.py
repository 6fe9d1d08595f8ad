"""One thread for tests on small tensors, which are slower on more, much so on a busy machine."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """For the files that import it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
