"""Epsilon in a `Trainer`'s logs, and the account in its checkpoints."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

import accountants


class DPCallback(TrainerCallback, ExportableState):
    """Adds "epsilon" to the logs and to `trainer_state.json`, where the accountant's history is kept as well.

    :class:`gsm.transformers.DPTrainer` brings its own. In a plain `Trainer` whose `optimizers=` hold a
    :class:`gsm.optimizer.DPOptimizer`, set `optimizer.accountant = callback.accountant`: this callback then reports
    what was spent. The sampling and the loss remain the caller's responsibility.

    Args:
        target_delta: the delta of the epsilon that is logged.
        accountant: name of an accountant.
        history: what was charged earlier, `(noise_multiplier, sample_rate, steps)` each.

    Example:
        >>> callback = DPCallback(target_delta=1e-5)
        >>> optimizer.accountant, optimizer.sample_rate = callback.accountant, batch_size / len(data)
        >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback])
    """

    def __init__(
        self, target_delta: float, accountant: str = "prv", history: list[tuple[float, float, int]] | None = None
    ) -> None:
        self.target_delta = target_delta
        self.accountant = accountants.create_accountant(accountant)
        self.load(history or [])

    def load(self, history: Any) -> None:
        """Takes over a history, from a checkpoint for example; the accountant object stays the same."""
        self.accountant.load_state_dict(
            {"history": [(float(s), float(q), int(n)) for s, q, n in history], "mechanism": self.accountant.mechanism()}
        )

    def take_over(self, state: TrainerState) -> None:
        """Takes over the account of the checkpoint that a run resumes from, unless this object knows of more steps:
        those were taken, whatever is loaded now.

        Raises:
            ValueError: a checkpoint without an account.
        """
        if not state.global_step:
            return
        found = state.stateful_callbacks.get("DPCallback")
        if not found:
            raise ValueError(
                "the checkpoint's trainer_state.json holds no privacy account: it was not written by private training, "
                "and what its steps cost is unknown"
            )
        history = (found[0] if isinstance(found, list) else found)["args"]["history"]
        saved, known = sum(int(entry[2]) for entry in history), self.accountant.num_steps
        if known > saved:
            warnings.warn(
                f"the checkpoint's account has {saved} steps and this trainer has taken {known}: all of them stay on "
                "the account",
                stacklevel=2,
            )
        else:
            self.load(history)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Goes on with the account of a checkpoint, also where the `Trainer` has made this object anew from it."""
        self.take_over(state)
        private = getattr(optimizer, "optimizer", optimizer)
        charged = None if getattr(private, "of_engine", True) else private.accountant
        if state.global_step and charged is not None and not charged.history:
            private.accountant = self.accountant

    def epsilon(self) -> float:
        """What was spent so far, at `target_delta`."""
        return float(self.accountant.get_epsilon(self.target_delta))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Forgets the gradients of the step: the `Trainer` only asks the model to."""
        if optimizer is not None:
            optimizer.zero_grad()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds epsilon to an entry that does not have it."""
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None and "epsilon" not in entry:
                entry["epsilon"] = self.epsilon()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps."""
        return {
            "args": {
                "target_delta": self.target_delta,
                "accountant": self.accountant.mechanism(),
                "history": [list(entry) for entry in self.accountant.history],
            },
            "attributes": {},
        }
