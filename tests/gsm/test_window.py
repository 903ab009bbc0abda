"""What a thread computes is recorded from a forward to its backward, and no longer."""

import threading

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gsm import GradSampleModule, loss_check, recording
from gsm.window import Window, window


def names():
    return [op.call.__name__.partition(".")[0] for op in window().recording.operations]


def wrapped():
    window().pause()
    window().waiting.clear()
    return GradSampleModule(nn.Sequential(nn.Linear(6, 3), nn.Tanh()), mode="ghost")


def test_what_the_model_computes_is_not_recorded():
    model, x = wrapped(), torch.randn(5, 6)
    first = model(x).square()
    second = model(x).exp()
    loss = (first + second).mean()
    assert [n for n in names() if n != "detach"] == ["pow", "exp", "add", "mean"]
    loss.backward()
    assert not window().recording.on and not _get_current_dispatch_mode_stack()


def test_it_begins_anew_with_the_next_batch():
    model, x = wrapped(), torch.randn(5, 6)
    for _ in range(3):
        loss = model(x).square().mean()
        assert len(window().outputs) == 1
        loss.backward()
        assert not window().outputs and not window().recording.given
        model.set_grad_sample_to_none()


def test_only_the_first_batches_are_recorded():
    model, x = wrapped(), torch.randn(5, 6)
    for step in range(loss_check.FIRST + 2):
        out = model(x)
        assert window().recording.on == (step < loss_check.FIRST)
        out.square().mean().backward()
        model.set_grad_sample_to_none()


def test_outputs_that_are_never_sent_back_do_not_record_for_ever(monkeypatch):
    monkeypatch.setattr(recording, "MOST_OPERATIONS", 5)
    model, x, kept = wrapped(), torch.randn(5, 6), []
    for _ in range(12):
        kept.append(model(x).square())
    assert len(window().recording.operations) <= 5
    loss = model(x).square().mean()
    assert window().recording.on and len(window().outputs) == 1
    loss.backward()
    assert not window().recording.on


def test_each_thread_has_its_own():
    found = []
    thread = threading.Thread(target=lambda: found.append(window()))
    thread.start()
    thread.join()
    assert isinstance(found[0], Window) and found[0] is not window()
