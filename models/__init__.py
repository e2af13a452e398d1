"""Whole models: the stack of sublayers, presets, checkpoints in and out, decoding."""

from models.config import Config
from models.language_model import LanguageModel, build_model
from models.presets import PRESETS

__all__ = ["PRESETS", "Config", "LanguageModel", "build_model"]
