"""Differentially private training for PyTorch models as they are."""

from gsm.wrapper import GradSampleModule

__all__ = ["GradSampleModule"]
