"""Private training with Hugging Face transformers: `DPTrainer`, its callback and settings, and per-sample losses."""

from gsm.losses import per_sample_loss

try:
    from gsm.transformers.arguments import PrivacyArguments
    from gsm.transformers.callback import DPCallback
    from gsm.transformers.trainer import DPTrainer
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "accelerate"):
        raise
    raise ModuleNotFoundError(
        f"gsm.transformers needs {error.name}: pip install 'opacus-gsm[transformers]' (gsm.losses does not)",
        name=error.name,
    ) from error

__all__ = ["DPCallback", "DPTrainer", "PrivacyArguments", "per_sample_loss"]
