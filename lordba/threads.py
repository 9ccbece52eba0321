"""How many threads torch may use."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch on one thread; also a decorator.

    OpenMP's barriers wait for the slower core: on a machine with other work, two threads took ten times as long as
    one for the small operations here. One thread also makes sums the same wherever they run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
