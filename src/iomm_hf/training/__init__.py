"""The trainable unit and the one loop that runs both stages."""

from .config import FinetuneConfig, PretrainConfig
from .loop import train
from .module import IOMMTrainingModule


__all__ = ["FinetuneConfig", "IOMMTrainingModule", "PretrainConfig", "train"]
