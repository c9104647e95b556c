"""Tiny builds of a model by name, on one thread."""

import pytest
import torch

from data.tasks import TaskSpec
from fusion import registry

LABELS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def one_thread():
    """Passes through models this small are fastest on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build():
    """`build(name, seed=0, **overrides)`: the model's tiny Config with overrides, three labels."""

    def make(name, *, seed=0, labels=LABELS, **overrides):
        torch.manual_seed(seed)
        model = registry.get(name)
        config = model.Config(name=name, **{**model.TINY, **overrides})
        return model(config, TaskSpec(name="tiny", kind="multilabel", labels=labels))

    return make
