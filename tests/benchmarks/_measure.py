"""What `speed` measures with: seconds and floating-point operations of calls, and bare matrix products."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def now() -> float:
    """Seconds on a clock, after a GPU has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(*calls: Callable[[], object], repeats: int = 30) -> list[float]:
    """The shortest time of one call of each, after one unmeasured call.

    The calls take turns, so that whatever else the machine does slows all of them.
    """
    for call in calls:
        call()
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for number, call in enumerate(calls):
            start = now()
            call()
            best[number] = min(best[number], now() - start)
    return best


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


class FlopCounter(TorchDispatchMode):
    """Counts operations of matrix products and convolutions, also of backward passes, by torch's formulas.

    torch's FlopCounterMode also hooks modules, which fails where gradients are switched off in the middle of a call.
    """

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Run an operation and count it; one without a formula is decomposed into others first."""
        options = options or {}
        if function._overloadpacket not in flop_registry:
            with self:
                result = function.decompose(*arguments, **options)
            if result is not NotImplemented:
                return result
        result = function(*arguments, **options)
        if (formula := flop_registry.get(function._overloadpacket)) is not None:
            self.total += formula(*arguments, **options, out_val=result)
        return result


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call."""
    with FlopCounter() as counter:
        call()
    return counter.total


def matrix_product(flops: int, device: torch.device | str, size: int = 64) -> Callable[[], object]:
    """One matrix product of about so many floating-point operations, `size` columns wide like our layers."""
    left = torch.randn(max(1, flops // (2 * size * size)), size, device=device)
    right = torch.randn(size, size, device=device)
    return lambda: left @ right
