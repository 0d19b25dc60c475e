"""
Pretraining that one YAML file describes: model, data, training, and how it is distributed.

    from recipes.orchestrator import load_config, PretrainingOrchestrator

Nothing is imported until it is used.
"""

import importlib

MODULE_OF = {
    "load_config": "config_loader",
    "PretrainingOrchestrator": "orchestrator",
    "get_fsdp_config": "strategies",
    "setup_ddp": "strategies",
    "setup_model_with_ddp": "strategies",
    "SpeedMonitor": "speed_monitor",
}
__all__ = list(MODULE_OF)  # noqa: PLE0605  names that __getattr__ has


def __getattr__(name: str):
    """The public name, imported from its module."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULE_OF[name]}"), name)
