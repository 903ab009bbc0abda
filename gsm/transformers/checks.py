"""Settings of `TrainingArguments` that private training cannot honour."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from gsm.transformers.arguments import PrivacyArguments


def check_arguments(args: Any, train_dataset: Any, privacy: PrivacyArguments, seeded: bool) -> None:
    """Raises ValueError for settings under which the guarantee would not hold, naming the setting and what to do."""
    if not isinstance(privacy, PrivacyArguments):
        raise TypeError(f"privacy must be gsm.transformers.PrivacyArguments, got {type(privacy).__name__}")
    if seeded and privacy.secure_mode:
        raise ValueError("secure_mode takes its randomness from the operating system: it goes without generator=")
    strategy = getattr(args, "train_sampling_strategy", "random")
    refused = {
        f"max_grad_norm={args.max_grad_norm}: it is the clipping bound on one record, a positive number": (
            not args.max_grad_norm or args.max_grad_norm <= 0
        ),
        "fp16=True: scaled losses cannot be clipped sample by sample; use bf16=True": args.fp16,
        f"world_size={args.world_size}: DPTrainer trains on one device": args.world_size > 1,
        f"{args.n_gpu} devices under DataParallel: set CUDA_VISIBLE_DEVICES to one": args.n_gpu > 1,
        "deepspeed or fsdp: parameters must be whole on the device": bool(args.deepspeed or args.fsdp),
        "auto_find_batch_size=True: the sample rate would change after a failure; set the batch size": (
            args.auto_find_batch_size
        ),
        "use_liger_kernel=True: its fused loss is a mean over the batch": getattr(args, "use_liger_kernel", False),
        "torch_compile=True: the compiled model is not the one whose gradients are captured": args.torch_compile,
        f"train_sampling_strategy={strategy!r}: batches are Poisson samples": strategy != "random",
        "group_by_length=True: batches are Poisson samples": getattr(args, "group_by_length", False),
    }
    found = [text for text, applies in refused.items() if applies]
    if found:
        raise ValueError(f"not possible in private training: {'; '.join(found)}")
    if train_dataset is None:
        return  # evaluation only
    if isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__"):
        raise ValueError("private training needs a train_dataset with a length: a stream cannot be Poisson sampled")
    if len(train_dataset) == 0:
        raise ValueError("train_dataset is empty")
