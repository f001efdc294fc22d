"""The two rates everything is compared with, measured once on the device."""

import torch

from kvrelay_bench.gpu.timing import Stopwatch
from kvrelay_bench.gpu.work import Ceilings, Plan

_CPU_L2 = 1 << 16


def measure_ceilings(watch: Stopwatch, plan: Plan) -> Ceilings:
    """A large copy and a large bfloat16 product, on random data."""
    l2 = _CPU_L2
    if watch.device.type == "cuda":
        l2 = torch.cuda.get_device_properties(watch.device).L2_cache_size
    return Ceilings(_copy_rate(watch, plan.copy_bytes), _product_rate(watch, plan.gemm_size), l2)


def _copy_rate(watch: Stopwatch, nbytes: int) -> float:
    source = torch.randint(0, 1 << 30, (nbytes // 4,), dtype=torch.int32, device=watch.device)
    target = torch.empty_like(source)
    copy = watch.time([lambda: target.copy_(source)])
    assert torch.equal(source[-1000:], target[-1000:])
    return 2 * source.nbytes / copy.seconds


def _product_rate(watch: Stopwatch, size: int) -> float:
    left, right = (torch.randn(size, size, device=watch.device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    product = watch.time([lambda: torch.mm(left, right, out=out)])
    return 2 * size**3 / product.seconds
