"""The trainable unit and the one loop that runs both stages and LoRAs."""

from .config import FinetuneConfig, LoraTrainingConfig, PretrainConfig
from .loop import train
from .module import IOMMTrainingModule


__all__ = ["FinetuneConfig", "IOMMTrainingModule", "LoraTrainingConfig", "PretrainConfig", "train"]
