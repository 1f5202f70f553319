"""Settings of the process that make training on a CPU faster and change no result that matters."""

from __future__ import annotations

import ctypes
import logging

import torch

log = logging.getLogger(__name__)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def tune_for_training() -> None:
    """Keep freed memory in the process, and round numbers below 1e-38 to zero.

    glibc gives large blocks back to the system at once and takes them from there anew, each page
    faulted in and zeroed: for the logits of a step that costs half as long as their matrix product.
    Denormal numbers (the moments of rows that get no gradient decay to them, and so does the slope
    of a saturated pair) slow a product down by an order of magnitude.
    """
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: its own rules
        log.info("this C library has no mallopt; freed memory goes back to the system")
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
