"""Settings of this process that make training on a CPU faster. Nothing here is done unless it is asked for."""

import ctypes
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def tune_cpu() -> list[str]:
    """Settings for the whole process, for good; returns a sentence for each, of what was done or why not.

    Freed memory is kept instead of given back, because touching fresh memory costs a page fault every 4 KiB: a process then holds its peak.
    And float32 matrix products go to oneDNN, which on many CPUs is faster than torch's default; torch reaches it only by a setting that
    permits lower precision, so it is taken back where a product then loses any.
    """
    return [_keep_freed_memory(), _onednn_products()]


def _keep_freed_memory() -> str:
    if platform.libc_ver()[0] != "glibc":
        return "freed memory is given back: only glibc's allocator can be told to keep it"
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)
    return "freed memory is kept" if kept else "freed memory is given back: glibc refused to keep it"


def _onednn_products() -> str:
    if not torch.backends.mkldnn.is_available():
        return "float32 products are torch's own: it was built without oneDNN"
    matmul = torch.backends.mkldnn.matmul
    before, exact = matmul.fp32_precision, _error()
    matmul.fp32_precision = "bf16"
    if _error() < 4 * exact:
        return "float32 products are oneDNN's, in full precision"
    matmul.fp32_precision = before
    return "float32 products are torch's own: oneDNN's would be less precise on this CPU"


def _error() -> float:
    """The largest error of some products of random matrices, small and large ones."""
    draw = torch.Generator().manual_seed(0)
    found = 0.0
    for size in (64, 512):
        a, b = torch.randn(2, size, size, generator=draw)
        found = max(found, (a @ b - (a.double() @ b.double())).abs().max().item() / size**0.5)
    return found
