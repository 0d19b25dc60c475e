"""Numbers as people read them: bytes and seconds."""

from __future__ import annotations


def format_bytes(n_bytes: float) -> str:
    """Three digits and a unit of 10^3, 10^6 or 10^9 bytes: "1.49 GB", "12.3 MB", "840 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * size:
            scaled = n_bytes / size
            return f"{scaled:.3g} {unit}" if n_bytes < 999.5 * size else f"{scaled:,.0f} {unit}"
    return f"{n_bytes:.0f} bytes"


def format_duration(seconds: float) -> str:
    """One or two units: "0.25 s", "45 s", "3 min 20 s", "2 h 5 min", "3 days 4 h"."""
    s = round(seconds)
    units = (("days", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))
    for unit, size, smaller_unit, smaller_size in units:
        if s >= size:
            unit = "day" if unit == "days" and s < 2 * size else unit
            return f"{s // size} {unit} {s % size // smaller_size} {smaller_unit}"
    return f"{seconds:.2g} s"
