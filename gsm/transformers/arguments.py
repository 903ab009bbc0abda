"""What a private `Trainer` has to be told beside `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field

import accountants


@dataclass
class PrivacyArguments:
    """Settings of :class:`gsm.transformers.DPTrainer`; `HfArgumentParser` makes command-line options of them.

    The clipping bound is `TrainingArguments.max_grad_norm`: what bounds the norm of a batch's gradient in ordinary
    training bounds that of every single record here.

    Example:
        >>> parser = HfArgumentParser((TrainingArguments, PrivacyArguments))
        >>> args, privacy = parser.parse_args_into_dataclasses()
        >>> DPTrainer(model, args, privacy=privacy, train_dataset=data).train()
    """

    target_epsilon: float | None = field(
        default=None, metadata={"help": "Epsilon after the whole training; the noise is computed from it."}
    )
    target_delta: float | None = field(
        default=None, metadata={"help": "Delta of every epsilon; by default 1 / (10 * number of records)."}
    )
    noise_multiplier: float | None = field(
        default=None, metadata={"help": "Noise standard deviation over max_grad_norm, instead of target_epsilon."}
    )
    clipping: str = field(
        default="flat",
        metadata={
            "help": "flat, per_layer, automatic or adaptive.",
            "choices": ["flat", "per_layer", "automatic", "adaptive"],
        },
    )
    mode: str = field(
        default="auto", metadata={"help": "auto, hooks, ghost, functorch or loop (see gsm.GradSampleModule)."}
    )
    accountant: str = field(default="prv", metadata={"help": "prv, pld, rdp, gdp or a registered name."})
    secure_mode: bool = field(default=False, metadata={"help": "Cryptographic sampling and noise."})
    log_training_loss: bool = field(
        default=False,
        metadata={"help": "Log the training loss, which depends on the data without noise: epsilon does not cover it."},
    )

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of target_epsilon and noise_multiplier")
        if self.target_delta is not None and not 0 < self.target_delta < 1:
            raise ValueError(f"target_delta must be in (0, 1), got {self.target_delta}")

    def delta(self, records: int) -> float:
        """`target_delta`, or its default for a training set of so many records."""
        return self.target_delta if self.target_delta is not None else 1 / (10 * records)

    def noise_for(
        self, *, sample_rate: float, delta: float, steps: int, history: list[tuple[float, float, int]]
    ) -> float:
        """The noise multiplier of the `steps` still to come, after a `history` of steps that were charged already.

        Raises:
            ValueError: the steps to come would exceed `target_epsilon` with the noise used so far.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None
        if not history:
            return accountants.get_noise_multiplier(
                target_epsilon=self.target_epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=self.accountant,
            )
        sigma = history[-1][0]
        planned = accountants.create_accountant(self.accountant)
        planned.history = [*history, (sigma, sample_rate, steps)] if steps else list(history)
        epsilon = planned.get_epsilon(delta)
        if epsilon > self.target_epsilon * (1 + 1e-6):
            taken = sum(entry[2] for entry in history)
            raise ValueError(
                f"{taken} steps are on the account already, and {steps} more with the noise used so far ({sigma:.4g}) "
                f"would end at epsilon = {epsilon:.3g}, above target_epsilon = {self.target_epsilon:g}: train for "
                "fewer steps, or give the noise_multiplier of the steps to come"
            )
        return sigma
