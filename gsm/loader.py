"""Data loaders that draw Poisson batches, and that cut logical batches into physical ones.

What the accountant assumes and what the loader does must agree, so a loader whose sampling would be replaced without
a word (weighted, subset, hand-written batch samplers, streams) is refused with a message instead.
"""

from __future__ import annotations

import logging
import random
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import opacus.data_loader
import torch
from opacus.data_loader import CollateFnWithEmpty
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler, UniformWithReplacementSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.dataloader import default_collate
from torch.utils.data.distributed import DistributedSampler

from gsm import drawn, ledger
from gsm.collate import CollateWithEmpty
from gsm.loss_check import looks_at_the_next
from gsm.sampling import DistributedPoissonSampler, PoissonSampler

logger = logging.getLogger(__name__)

POISSON_SAMPLERS = (UniformWithReplacementSampler, DistributedUniformWithReplacementSampler)
LEFT_OUT = (
    "{n} of the {handed} batches of this pass were run through the model and got no step. If what came out decided "
    "that (a loss that was not finite or too large), it tells about their records which batches count, and epsilon "
    "does not hold: take a step for every batch. Samples whose gradients are not finite are left out by the optimizer, "
    "others are clipped. If it was decided beforehand (every tenth batch, say), nothing is wrong."
)
SKIPPED = (
    "{n} empty batch(es) of this epoch got no optimizer.step(): a skipped step tells that the batch was empty, and the "
    "accountant was not charged for it. Run the ordinary loop on an empty batch too (it has zero rows; its release is "
    "noise alone)."
)
_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


def loader_options(loader: DataLoader) -> dict[str, Any]:
    """The options of a loader that have nothing to do with sampling, as keyword arguments for another one."""
    return {name: getattr(loader, name) for name in _KEPT}


def batches_per_epoch(loader: Any) -> int:
    """``len(loader)``, > 0.

    Raises:
        ValueError: the loader has no length, or is empty.
    """
    try:
        count = len(loader)
    except TypeError as error:
        raise ValueError(
            f"the data loader ({type(loader).__name__}) has no length, so the sample rate is unknown. "
            "Use a map-style dataset with __len__."
        ) from error
    if count == 0:
        raise ValueError("the data loader has no batches: empty dataset, or drop_last with batch_size > len(dataset)")
    return count


def _check_replaceable(loader: Any, distributed: bool) -> None:
    """Raise unless replacing this loader's sampling by Poisson sampling is what its user can have meant."""
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"Poisson sampling needs a torch.utils.data.DataLoader, got {type(loader).__name__}: it has to draw its "
            "own batches. Wrap the dataset in a DataLoader."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "Uniform sampling is not supported for IterableDataset: a stream cannot be Poisson sampled. "
            "Use a map-style dataset, or poisson_sampling=False (and read what that assumes)."
        )
    if loader.batch_sampler is None:
        raise ValueError("Non-batch processing is not supported: the loader has batch_size=None. Give it a batch_size.")
    if isinstance(loader.batch_sampler, POISSON_SAMPLERS):
        return
    sampler, custom = loader.sampler, loader.batch_sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if type(custom) is BatchSampler and (plain or (distributed and type(sampler) is DistributedSampler)):
        return
    name = type(custom).__name__ if type(custom) is not BatchSampler else type(sampler).__name__
    raise ValueError(
        f"the loader draws its batches with a {name}, which Poisson sampling would replace. The accountant assumes "
        "that every record enters every batch independently with the same probability. Give a loader with shuffle=True "
        "or shuffle=False (a torch.utils.data.Subset instead of a SubsetRandomSampler; no weights), or keep this one "
        "with poisson_sampling=False and account for what it does."
    )


class DPDataLoader(opacus.data_loader.DPDataLoader):
    """A loader of Poisson batches: their size varies, and a batch may be empty (zero rows, same structure).

    A loss that cannot take a batch without rows (``F.ctc_loss``) is ``out.sum() * 0`` there; the step is taken as ever.

    Args:
        dataset: map-style dataset with a length.
        sample_rate: probability with which each record enters each batch, in (0, 1].
        collate_fn: as for ``torch.utils.data.DataLoader``.
        drop_last: ignored with a log message: Poisson batches have no incomplete last one.
        generator: source of the sampling; None is torch's global generator.
        distributed: draw this rank's share of a joint Poisson batch.
        batch_first: accepted for compatibility; the batch dimension is found by collating one record and two.
        rand_on_empty: must be False.
        steps: batches per epoch; by default ``int(1 / sample_rate)``.
        secure_mode: sample from the operating system's cryptographic generator.
        kwargs: passed on to ``torch.utils.data.DataLoader``.

    Raises:
        ValueError: a rate outside (0, 1], an empty dataset, ``rand_on_empty=True``.

    Example:
        >>> loader = DPDataLoader(TensorDataset(torch.randn(100, 3)), sample_rate=0.1)
        >>> len(loader)
        10
    """

    #: The private optimizer that is to step on every batch, if known.
    optimizer: weakref.ref[Any] | None = None

    def __init__(
        self,
        dataset: Any,
        *,
        sample_rate: float,
        collate_fn: Any = None,
        drop_last: bool = False,
        generator: Any = None,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        steps: int | None = None,
        secure_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        if rand_on_empty:
            raise ValueError(
                "rand_on_empty=True would fill an empty batch with a made-up record, whose gradient enters the sum: "
                "one real record more or less then changes the sum by up to 2 * max_grad_norm, and the noise covers "
                "half of it. Leave it False: an empty batch has zero rows here, also as the very first one."
            )
        if drop_last:
            logger.warning("Ignoring drop_last: Poisson batches vary in size and none is incomplete.")
        self.sample_rate, self.distributed, self.secure_mode = sample_rate, distributed, secure_mode
        common: dict[str, Any] = {
            "sample_rate": sample_rate,
            "generator": None if secure_mode else generator,
            "steps": steps,
            "secure_mode": secure_mode,
        }
        sampler: Sampler = (
            DistributedPoissonSampler(total_size=len(dataset), **common)
            if distributed
            else PoissonSampler(num_samples=len(dataset), **common)
        )
        collate = CollateWithEmpty(collate_fn if collate_fn is not None else default_collate, dataset)
        # Opacus's constructor would fetch a record and build its own sampler: torch's is the one to call.
        DataLoader.__init__(
            self, dataset=dataset, batch_sampler=sampler, collate_fn=collate, generator=generator, **kwargs
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A new queue for each pass: workers may have fetched ahead for one that was abandoned.
        sizes = self.batch_sampler.sizes = deque(maxlen=1 << 16)  # type: ignore[union-attr]
        return self._watched(drawn.counted(super().__iter__(), sizes, self._looked_at))

    def _looked_at(self) -> bool:
        optimizer = self.optimizer() if self.optimizer is not None else None
        return optimizer is not None and looks_at_the_next(optimizer.params)

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Says at the end of an epoch if just the empty batches got no step, or some that the model has seen.

        That they were empty, or what the model made of them, is private.
        """
        optimizer = self.optimizer() if self.optimizer is not None else None
        if optimizer is None:
            yield from batches
            return
        before, handed, empty, left_out = optimizer.releases, 0, 0, 0
        records = drawn.records()
        for batch in batches:
            count, records = drawn.records() - records, drawn.records()
            if torch.is_grad_enabled():
                handed, empty = handed + 1, empty + (count == 0)
                optimizer.begin_sample()
            else:
                optimizer.only_looked_at()
            released, seen = optimizer.releases, _calls(optimizer)
            yield batch
            stepped = optimizer.releases > released or optimizer.accumulates
            left_out += before < released and not stepped and _calls(optimizer) > seen
        if torch.is_grad_enabled():
            optimizer.begin_sample()  # before the last one, where something fetches ahead
        skipped = handed - (optimizer.releases - before)
        if empty and skipped == empty:
            warnings.warn(SKIPPED.format(n=empty), stacklevel=2)
        elif 0 < left_out < optimizer.releases - before:
            warnings.warn(LEFT_OUT.format(n=left_out, handed=handed), stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        """Without the optimizer: a copy's batches are not its."""
        return {name: value for name, value in self.__dict__.items() if name != "optimizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        sampler: Any = self.batch_sampler
        sampler.refresh()  # the copy and the original draw different batches

    @classmethod
    def from_data_loader(
        cls,
        data_loader: DataLoader,
        *,
        distributed: bool = False,
        generator: Any = None,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        secure_mode: bool = False,
    ) -> DPDataLoader:
        """A Poisson loader over the same dataset with the same expected batch size, ``sample_rate = 1 / len(loader)``.

        Args:
            data_loader: an ordinary loader (shuffled or not), or one that already draws Poisson batches.
            generator: replaces the loader's own generator.
            distributed, batch_first, rand_on_empty, secure_mode: as for the constructor.

        Raises:
            TypeError: not a torch DataLoader.
            ValueError: a loader whose sampling cannot be replaced; the message says why and what to do.
        """
        _check_replaceable(data_loader, distributed)
        steps = batches_per_epoch(data_loader)
        batch_sampler = data_loader.batch_sampler
        distributed = distributed or isinstance(batch_sampler, DistributedUniformWithReplacementSampler)
        rate = batch_sampler.sample_rate if isinstance(batch_sampler, POISSON_SAMPLERS) else 1 / steps
        return cls(
            data_loader.dataset,
            sample_rate=rate,
            collate_fn=_own_collate(data_loader.collate_fn),
            drop_last=data_loader.drop_last,
            generator=generator if generator is not None else data_loader.generator,
            distributed=distributed,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
            steps=steps,
            secure_mode=secure_mode,
            **loader_options(data_loader),
        )


def _calls(optimizer: Any) -> int:
    """How often the model was called so far, with gradients."""
    params = optimizer.params
    tape = ledger.tape_of(params[0]) if params else None
    return 0 if tape is None else tape.calls


def _own_collate(collate: Any) -> Any:
    """The user's collate function, out of the wrapper that an earlier Poisson loader put around it."""
    if isinstance(collate, CollateWithEmpty):
        return collate.collate_fn
    return collate.wrapped_collator_fn if isinstance(collate, CollateFnWithEmpty) else collate


class SecureShuffle(Sampler[int]):
    """A uniformly random order of ``count`` records from the operating system's cryptographic generator."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        random.SystemRandom().shuffle(order)
        return iter(order)


def with_secure_shuffle(loader: DataLoader) -> DataLoader:
    """The same loader; if it shuffles, it shuffles with a cryptographic generator."""
    if type(loader.sampler) is not RandomSampler:
        return loader
    order: Sampler = SecureShuffle(len(loader.dataset))  # type: ignore[arg-type]
    options = {"collate_fn": loader.collate_fn, **loader_options(loader)}
    if loader.batch_size is None:  # every item of the dataset is a batch
        return DataLoader(loader.dataset, batch_size=None, sampler=order, **options)
    batches = BatchSampler(order, loader.batch_size, loader.drop_last)
    return DataLoader(loader.dataset, batch_sampler=batches, **options)
