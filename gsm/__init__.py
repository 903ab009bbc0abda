"""Differentially private training for PyTorch models as they are.

>>> from gsm import make_private
>>> model, optimizer, loader = make_private(model, optimizer, loader, noise_multiplier=1.1, max_grad_norm=1.0)
"""

from gsm import opacus
from gsm.engine import PrivacyEngine
from gsm.optimizer import DPOptimizer
from gsm.private_training import make_private
from gsm.verify import verify
from gsm.wrapper import GradSampleModule

__all__ = ["DPOptimizer", "GradSampleModule", "PrivacyEngine", "make_private", "opacus", "verify"]
