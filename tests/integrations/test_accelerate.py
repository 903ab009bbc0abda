"""A loop of one's own under `accelerate`, and what transformers' own methods do on a wrapped model."""

from __future__ import annotations

import copy

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="needs the transformers extra")

from gsm import make_private  # noqa: E402
from gsm.losses import per_sample_loss  # noqa: E402
from gsm.wrapper import GradSampleModule  # noqa: E402
from tests.integrations.tiny import bert, classified, gpt2, pad  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")


def test_prepared_objects_train_privately():
    model = bert()
    loader = torch.utils.data.DataLoader(classified(12), batch_size=4, collate_fn=pad)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, noise_multiplier=1.0)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(*private)
    old = copy.deepcopy([p.detach() for p in model.parameters()])
    for batch in loader:
        optimizer.zero_grad()
        labels = batch.pop("labels")
        accelerator.backward(per_sample_loss(model(**batch), labels).mean())
        optimizer.step()
    assert private[1].accountant.history == [(1.0, 1 / 3, 3)]
    assert not any(torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_generation_between_steps(mode):
    """`generate` looks at the signature of the model's forward."""
    ids = torch.randint(1, 31, (2, 4))
    expected = gpt2().eval().generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model = gpt2()
    wrapped = GradSampleModule(model, mode=mode)
    per_sample_loss(model(input_ids=ids), ids).mean().backward()
    model.eval()
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), expected)
    assert torch.equal(wrapped.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), expected)


def test_saved_under_the_wrapper(tmp_path):
    model = bert()
    wrapped = GradSampleModule(model)
    wrapped.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
