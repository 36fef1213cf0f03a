"""IOMM for Hugging Face: train the drawing half of a unified multimodal model on unlabelled images.

Names load on first use, so that `import iomm_hf` costs nothing and needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_EXPORTS = {
    "IOMMConditionEncoder": "modeling_iomm",
    "IOMMConfig": "modeling_iomm",
    "ResidualQueryAdapter": "modeling_iomm",
    "IOMMProcessor": "processing_iomm",
    "IOMMPipeline": "pipeline_iomm",
    "predict_velocity": "generators",
    "get_preset": "presets",
    "shipped_model": "shipped",
}

if TYPE_CHECKING:
    from .generators import predict_velocity
    from .modeling_iomm import IOMMConditionEncoder, IOMMConfig, ResidualQueryAdapter
    from .pipeline_iomm import IOMMPipeline
    from .presets import get_preset
    from .processing_iomm import IOMMProcessor
    from .shipped import shipped_model

__all__ = [
    "IOMMConditionEncoder",
    "IOMMConfig",
    "IOMMPipeline",
    "IOMMProcessor",
    "ResidualQueryAdapter",
    "__version__",
    "get_preset",
    "predict_velocity",
    "shipped_model",
]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
