"""`DPTrainer`: the Trainer of transformers, private.

What changes against the ordinary one: batches are Poisson samples, the loss is every sample's own, the optimizer clips
and adds noise, and nothing that depends on the data without noise is logged or written to checkpoints (training loss,
gradient norm, counts of tokens and operations, how many random numbers were drawn), unless asked for.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import is_datasets_available

from gsm import validation
from gsm.losses import per_sample_loss
from gsm.noise import GaussianNoise
from gsm.optimizer import DPOptimizer
from gsm.sampling import PoissonSampler
from gsm.transformers.arguments import PrivacyArguments
from gsm.transformers.batches import AccumulationSteps, CollateInPieces
from gsm.transformers.callback import DPCallback
from gsm.transformers.checks import check_arguments
from gsm.wrapper import GradSampleModule

UNNOISED = ("loss", "grad_norm", "train_loss", "total_flos", "num_input_tokens_seen", "train_tokens_per_second")

OTHER_LOSS = (
    "{name}.compute_loss is used in evaluation only: private training needs one loss per sample, and takes it from "
    "compute_per_sample_loss(model, inputs). Override that one too, or pass compute_loss_func=."
)


class DPTrainer(Trainer):
    """A `transformers.Trainer` with differentially private training; everything else is as usual.

    Args:
        model, args, data_collator, train_dataset, ...: as for `Trainer`. `args.max_grad_norm` is the clipping bound on
            one record's gradient; `per_device_train_batch_size * gradient_accumulation_steps` the expected size of a
            logical batch, of which at most `per_device_train_batch_size` records are in memory at a time.
        privacy: the budget and the other settings.
        generator: seeded source of batches and noise, for experiments that are to be repeated. By default both come
            from the operating system: a `Trainer` seeds torch with `args.seed`, 42 unless changed, and to whoever knows
            the seed the noise would be no secret.
        compute_loss_func: `f(outputs, labels, num_items_in_batch=None)`, as in `Trainer`, but returning a vector with
            one entry per sample; by default :func:`gsm.losses.per_sample_loss`.
        task: which head it is, where :func:`gsm.losses.per_sample_loss` cannot tell.

    Formal guarantee: training is the Poisson-subsampled Gaussian mechanism (Abadi et al. 2016, algorithm 1) at rate
    `1 / ceil(records / logical batch)`, composed over the steps taken; neighbouring training sets differ by one record
    added or removed. It covers the trained parameters, the optimizer's state and the logs as they are by default. Not
    covered: evaluation on private data, what depends on it (`load_best_model_at_end`, early stopping), the choice of
    hyperparameters, and the training loss if `log_training_loss` asks for it.

    Raises:
        ValueError: settings that private training cannot honour; each message names the setting and what to do.

    Example:
        >>> trainer = DPTrainer(model, TrainingArguments("out", per_device_train_batch_size=32, max_grad_norm=0.5),
        ...                     privacy=PrivacyArguments(target_epsilon=3.0), train_dataset=data)
        >>> trainer.train()
        >>> trainer.get_epsilon()
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        privacy: PrivacyArguments,
        generator: torch.Generator | None = None,
        task: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, **kwargs)
        check_arguments(self.args, self.train_dataset, privacy, seeded=generator is not None)
        own = type(self).compute_loss is not Trainer.compute_loss
        if own and type(self).compute_per_sample_loss is DPTrainer.compute_per_sample_loss:
            warnings.warn(OTHER_LOSS.format(name=type(self).__name__), stacklevel=2)
        self.privacy, self.task = privacy, task
        self._generator = generator
        self._sampler: PoissonSampler | None = None
        self._private: DPOptimizer | None = None
        self._capture: GradSampleModule | None = None
        records = len(self.train_dataset) if self.train_dataset is not None else 1
        self.add_callback(DPCallback(privacy.delta(records), privacy.accountant))
        self.add_callback(_Start(self))

    # -- what a user asks ----------------------------------------------------------------------------------------------

    @property
    def dp_callback(self) -> DPCallback:
        """Holds the account (`Trainer` may replace its callbacks when it resumes)."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, DPCallback))

    @property
    def accountant(self) -> Any:
        """Keeps the account; charged once per step, before the parameters move."""
        return self.dp_callback.accountant

    @property
    def noise_multiplier(self) -> float | None:
        """Noise standard deviation over the clipping bound; None before training."""
        return self._private.noise_multiplier if self._private is not None else None

    def get_epsilon(self, delta: float | None = None) -> float:
        """Epsilon spent so far, at `delta` (by default the target's)."""
        return float(self.accountant.get_epsilon(self.dp_callback.target_delta if delta is None else delta))

    # -- batches -------------------------------------------------------------------------------------------------------

    @property
    def logical_batch_size(self) -> int:
        """Expected number of records in one release."""
        return self._train_batch_size * self.args.gradient_accumulation_steps

    @property
    def sample_rate(self) -> float:
        """Probability of every record to be in a logical batch."""
        return 1 / math.ceil(len(self.train_dataset) / self.logical_batch_size)

    def get_train_dataloader(self) -> DataLoader:
        """Poisson batches: `gradient_accumulation_steps` items each, every item a list of batches for the device."""
        dataset: Any = self.train_dataset
        if dataset is None:
            raise ValueError("training needs a train_dataset")
        collate = self.data_collator
        if is_datasets_available() and _is_datasets(dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        self._sampler = PoissonSampler(
            num_samples=len(dataset),
            sample_rate=self.sample_rate,
            generator=self._generator,
            secure_mode=self._generator is None,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=AccumulationSteps(self._sampler, self.args.gradient_accumulation_steps),
            collate_fn=CollateInPieces(collate, self._train_batch_size),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    # -- the private optimizer and the capture -------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """The ordinary optimizer inside a :class:`gsm.optimizer.DPOptimizer`; its noise is set when training begins."""
        optimizer = super().create_optimizer(model)
        if self._private is None or getattr(optimizer, "optimizer", optimizer) is not self._private:
            self._private = DPOptimizer(
                optimizer,
                noise_multiplier=1.0,
                max_grad_norm=self.args.max_grad_norm,
                expected_batch_size=len(self.train_dataset) * self.sample_rate,
                clipping=self.privacy.clipping,
                secure_mode=self.privacy.secure_mode,
            )
            self.optimizer = self._private
        return self.optimizer

    def _begin(self) -> None:
        """Everything is prepared and loaded, and the first step is next."""
        assert self._private is not None and self._sampler is not None
        state, accountant = self.state, self.accountant
        self.dp_callback.take_over(state)
        self._private.noise_multiplier = self.privacy.noise_for(
            sample_rate=self.sample_rate,
            delta=self.dp_callback.target_delta,
            steps=state.max_steps - state.global_step,
            history=list(accountant.history),
        )
        self._private.accountant, self._private.sample_rate = accountant, self.sample_rate
        self._private.sampler = self._sampler
        self._set_randomness(resumed=bool(accountant.history))
        self.model.train()
        validation.validate(self.model)
        self._capture = GradSampleModule(self.model, mode=self.privacy.mode)

    def _set_randomness(self, resumed: bool) -> None:
        assert self._private is not None and self._sampler is not None
        if resumed or (self._generator is None and not self.privacy.secure_mode):
            self._private.noise.refresh()  # a run that goes on must not repeat the noise of its first part
        elif self._generator is not None:  # accelerate made the optimizer load its own state, and so forget the seed
            self._private.noise = GaussianNoise(self._generator)
        if resumed:
            self._sampler.refresh()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; afterwards the model is as it was, without hooks."""
        try:
            output = super().train(*args, **kwargs)
        finally:
            if self._private is not None:
                self._private.discard_pending()
            if self._capture is not None:
                self._capture.remove_hooks()
                self._capture = None
        if self.privacy.log_training_loss:
            return output
        metrics = {name: value for name, value in output.metrics.items() if name not in UNNOISED}
        return TrainOutput(output.global_step, math.nan, {**metrics, "epsilon": self.get_epsilon()})

    # -- one step ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one release. What was left of a logical batch that broke off enters none."""
        assert self._private is not None
        self._private.discard_pending()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Clips and adds one accumulation step's records to the pending sum; `optimizer.step` releases it."""
        assert self._private is not None
        model.train()
        total = torch.zeros((), device=self.args.device)
        for piece in inputs:
            piece = self._prepare_inputs(piece)
            with self.compute_loss_context_manager():
                losses = self.compute_per_sample_loss(model, piece)
            self._private.virtual_step(loss=losses)
            if self.privacy.log_training_loss:
                total += losses.detach().sum() / self.logical_batch_size
        if not inputs:
            self._nobody()
        return total

    def _nobody(self) -> None:
        """What an empty batch leaves behind: the gradients of no sample."""
        assert self._private is not None
        for p in self._private.params:
            p.grad_sample = p.new_zeros(0, *p.shape)
        self._private.virtual_step()

    def compute_per_sample_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The losses `[batch]` of one batch. Override it for a loss of your own.

        Raises:
            ValueError: `compute_loss_func` returned anything but one loss per sample.
        """
        targets: dict[str, Any] = {n: inputs[n] for n in ("labels", "start_positions", "end_positions") if n in inputs}
        inputs = {n: x for n, x in inputs.items() if n not in targets}
        if getattr(model.config, "is_encoder_decoder", False) and "labels" in targets:
            _give_decoder_inputs(model, inputs, targets["labels"])
        outputs = model(**inputs)
        if self.compute_loss_func is None:
            return per_sample_loss(
                outputs,
                targets,
                task=self.task,
                label_smoothing=self.args.label_smoothing_factor,
                virtual_tokens=_virtual_tokens(model, outputs, targets),
            )
        losses = self.compute_loss_func(outputs, targets.get("labels"), num_items_in_batch=None)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise ValueError(
                "compute_loss_func must return one loss per sample, a vector [batch]: a mean over the batch cannot be "
                "clipped sample by sample"
            )
        return losses

    # -- logs and checkpoints ------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds epsilon to what is logged in training, and leaves out what epsilon does not cover."""
        if self.is_in_train and not any(name.startswith("eval_") for name in logs):
            if not self.privacy.log_training_loss:
                for name in UNNOISED:
                    logs.pop(name, None)
            logs["epsilon"] = self.get_epsilon()
        super().log(logs, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: dropout has drawn numbers for every record, so the state tells how many were in the batches."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the number depends on the size of the batch, which is private."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: the number of tokens is private."""

    def _clip_grad_norm(self, model: Any) -> None:
        return None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """None: the private optimizer has clipped already, and norms are private."""
        return None


class _Start(TrainerCallback):
    """Tells a trainer that everything is prepared; no method of its own is called at that point."""

    def __init__(self, trainer: DPTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._begin()


def _is_datasets(dataset: Any) -> bool:
    import datasets

    return isinstance(dataset, datasets.Dataset)


def _give_decoder_inputs(model: Any, inputs: dict[str, Any], labels: Tensor) -> None:
    """The labels, shifted right, as the model itself makes them when it is given labels."""
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
    if make is None:
        raise ValueError(
            f"{type(model).__name__} cannot make decoder_input_ids from labels: have the data collator add them "
            "(DataCollatorForSeq2Seq(model=model))"
        )
    inputs["decoder_input_ids"] = make(labels)


def _virtual_tokens(model: Any, outputs: Any, targets: dict[str, Any]) -> int:
    """Positions that prompt tuning put in front: peft's number, if there are just so many more logits than labels."""
    config = getattr(model, "active_peft_config", None)
    count = getattr(config, "num_virtual_tokens", None) or 0
    labels, logits = targets.get("labels"), getattr(outputs, "logits", None)
    if not count or labels is None or logits is None or logits.dim() != 3 or labels.dim() != 2:
        return 0
    return count if logits.shape[1] == labels.shape[1] + count else 0
