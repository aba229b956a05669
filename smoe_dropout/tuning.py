"""Process-wide settings that speed up training on a CPU, applied only on request."""

import ctypes
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3)


def tune_cpu() -> list[str]:
    """Apply CPU settings to the whole process, permanently. Returns one sentence per setting: what was done, or why not.

    Freed memory is kept rather than returned to the system, because touching fresh memory costs a page fault per 4 KiB; the process then
    stays at its peak size. Float32 matrix products use oneDNN, which is faster than torch's default on many CPUs. torch only reaches it
    through a setting that permits lower precision, so the setting is reverted if products lose any.
    """
    return [_keep_freed_memory(), _onednn_products()]


def _keep_freed_memory() -> str:
    if platform.libc_ver()[0] != "glibc":
        return "freed memory is returned to the system: only glibc's allocator can keep it"
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)
    return "freed memory is kept" if kept else "freed memory is returned to the system: glibc refused to keep it"


def _onednn_products() -> str:
    if not torch.backends.mkldnn.is_available():
        return "float32 products use torch's default: it was built without oneDNN"
    matmul = torch.backends.mkldnn.matmul
    before, exact = matmul.fp32_precision, _error()
    matmul.fp32_precision = "bf16"
    if _error() < 4 * exact:
        return "float32 products are oneDNN's, in full precision"
    matmul.fp32_precision = before
    return "float32 products use torch's default: oneDNN would lose precision on this CPU"


def _error() -> float:
    """Largest error of small and large products of random matrices."""
    draw = torch.Generator().manual_seed(0)
    found = 0.0
    for size in (64, 512):
        a, b = torch.randn(2, size, size, generator=draw)
        found = max(found, (a @ b - (a.double() @ b.double())).abs().max().item() / size**0.5)
    return found
