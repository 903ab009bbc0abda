"""What one engine keeps: the accountant, the optimizers that charge it, their journal, and the numbers they used up."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from gsm import preparation
from gsm.accounts import keep_one_account
from gsm.generators import Used
from gsm.journal import Journal
from gsm.loader import DPDataLoader
from gsm.noise import GaussianNoise
from gsm.passes import passes_of
from gsm.sampling import DistributedPoissonSampler, PoissonSampler


class EngineAccount:
    """The account of one :class:`gsm.PrivacyEngine`.

    Args:
        accountant: is charged; fixed once an optimizer charges it.
    """

    def __init__(self, accountant: Any) -> None:
        self.optimizers: list[Any] = []
        self.accountant = accountant
        self.dataset: Any = None
        self.samplers: list[Any] = []
        self.used = Used()
        self.resumed = False
        self.journal: Journal | None = None

    @property
    def accountant(self) -> Any:
        """Who is charged."""
        return self._accountant

    @accountant.setter
    def accountant(self, value: Any) -> None:
        if self.optimizers:
            raise ValueError("this engine's optimizers charge the accountant they were made with: use a new engine")
        self._accountant = value

    def enter(self, optimizer: Any, loader: Any, sample_rate: float, poisson_sampling: bool) -> None:
        """Has the releases of ``optimizer`` charged, and compared with what ``loader`` draws."""
        if self.dataset is not None and self.dataset is not loader.dataset:
            warnings.warn(
                "PrivacyEngine detected new dataset object. Accounting works per dataset: make a new engine for "
                "another dataset, or ignore this if both hold the same records.",
                stacklevel=3,
            )
        self.dataset = getattr(loader, "dataset", None)
        keep_one_account(optimizer.params, self.accountant, self.dataset)
        if isinstance(optimizer, preparation.DPOptimizer):
            optimizer.accountant, optimizer.sample_rate = self.accountant, sample_rate
            optimizer.of_engine = True
            optimizer.independent_batches = poisson_sampling or preparation.draws_afresh(self.accountant, loader)
            optimizer.sampler = passes_of(loader)
            if getattr(self.accountant, "sampling", None) == "fixed_size":
                optimizer.records = len(loader.dataset)
            if isinstance(optimizer.noise, GaussianNoise):
                optimizer.noise.used = self.used
            optimizer.journal = self.journal
        else:
            optimizer.attach_step_hook(preparation.charging(self.accountant, loader, sample_rate))
            optimizer.accountant = self.accountant
        self.optimizers.append(optimizer)
        sampler = getattr(loader, "batch_sampler", None)
        if isinstance(sampler, PoissonSampler | DistributedPoissonSampler):
            self.samplers.append(sampler)
            sampler.used = self.used
            if isinstance(optimizer, preparation.DPOptimizer):
                optimizer.sampler = sampler
                if isinstance(loader, DPDataLoader):
                    loader.optimizer = weakref.ref(optimizer)
        if self.resumed:
            self.renew(optimizer)

    def renew(self, optimizer: Any) -> None:
        """A seeded run that resumes must repeat neither its noise nor its batches."""
        for sampler in self.samplers:
            sampler.refresh()
        for each in (*self.optimizers, optimizer):
            if isinstance(each, preparation.DPOptimizer):
                each.noise.refresh()

    def resume(self, optimizer: Any) -> None:
        """A checkpoint was loaded, into ``optimizer`` too: what an interrupted run released stays on the account."""
        if self.journal is not None:
            self._settle()
        self.resumed = True
        self.renew(optimizer)

    def keep_journal(self, path: Any) -> None:
        """See :meth:`gsm.PrivacyEngine.keep_journal`."""
        if any(not isinstance(optimizer, preparation.DPOptimizer) for optimizer in self.optimizers):
            raise ValueError("a journal needs gsm's own optimizer, which DistributedDataParallel does not use")
        if self.journal is not None:
            self.journal.close()
        self.journal = Journal(path, self.accountant.history)
        self._settle()
        for optimizer in self.optimizers:
            optimizer.journal = self.journal

    def _settle(self) -> None:
        assert self.journal is not None
        lost = self.journal.settle(self.accountant)
        if lost:
            warnings.warn(
                f"{lost} releases of an earlier run, made after its last checkpoint, are on the account now: the "
                f"journal {self.journal.path} has them.",
                stacklevel=4,
            )
