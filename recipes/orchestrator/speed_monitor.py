"""
How fast a loop of your own is: samples, tokens and batches per second, and MFU.

    monitor = SpeedMonitor(window_size=50, time_unit="hours")
    for batch in batches:
        ...
        monitor.update(samples=len(batch), tokens=batch.numel())
    monitor.compute()["samples_per_second"]

The trainer measures its own speed the same way: tokens_per_s and mfu in metrics.jsonl. An update
costs some microseconds (benchmarks/speed_monitor.py).
"""

from __future__ import annotations

import time
from collections import deque

import torch

from parts.cli.config import nearest_name
from parts.training.metrics import Speed, peak_flops

SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


class SpeedMonitor:
    """
    The speed over the last `window_size` updates; the time between two updates is a batch's.

    time_unit: of batches_per_UNIT and of the elapsed time. flops_per_token, device and dtype are
    for MFU: operations to train on a token, where, and in which format; n_devices: how many such
    devices share the work that is reported. clock() -> seconds. Raises ValueError.
    """

    def __init__(
        self,
        window_size: int = 50,
        time_unit: str = "hours",
        *,
        flops_per_token: float | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        n_devices: int = 1,
        clock=time.perf_counter,
    ):
        if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f"window_size: {window_size!r} is not a positive whole number")
        if time_unit not in SECONDS:
            near = nearest_name(str(time_unit), SECONDS)
            raise ValueError(f"time_unit: {time_unit!r} is not one of {', '.join(SECONDS)}{near}")
        self.time_unit = time_unit
        self.flops_per_token = flops_per_token
        peak = peak_flops(torch.device(device), dtype)
        self.speed = Speed(flops_per_token or 0, peak, n_devices, window_size, clock)
        self.counts = deque(maxlen=window_size)  # (samples, whether tokens were counted)
        self.mfu, self.elapsed_s = None, 0.0
        self.speed.start()

    def update(self, samples: int, tokens: int | None = None) -> None:
        """Report a batch of so many samples, and tokens if they are to be counted."""
        self.mfu = self.speed.stop(tokens or 0)["mfu"]
        self.elapsed_s += self.speed.recent[-1][1]
        self.speed.start()
        self.counts.append((samples, tokens is not None))

    def compute(self) -> dict[str, float | None]:
        """
        {"samples_per_second", "tokens_per_second", "batches_per_hour", "mfu", "elapsed_hours"}.

        Of the window, but for the time since the monitor was made. A figure is None if nothing was
        reported for it; mfu also if the peak of the device is not known.
        """
        unit = SECONDS[self.time_unit]
        seconds = sum(s for _, s in self.speed.recent)
        samples = sum(n for n, _ in self.counts)
        tokens = sum(n for n, _ in self.speed.recent)
        has_tokens = seconds > 0 and all(counted for _, counted in self.counts)
        return {
            "samples_per_second": samples / seconds if seconds else None,
            "tokens_per_second": tokens / seconds if has_tokens else None,
            f"batches_per_{self.time_unit[:-1]}": (
                len(self.counts) * unit / seconds if seconds else None
            ),
            "mfu": self.mfu if has_tokens and self.flops_per_token else None,
            f"elapsed_{self.time_unit}": self.elapsed_s / unit,
        }
