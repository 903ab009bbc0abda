"""Per-sample gradients, their norms and their weighted sums, layer by layer, from activations and output gradients.

Pure functions of tensors: no hooks, no optimizers. Importing the package registers a sampler for every layer of
`torch.nn` that has parameters of its own and treats each sample by itself (`nn.RNN`, `nn.GRU`, `nn.LSTM` and
`nn.MultiheadAttention` are rewritten in terms of linear layers); and, by name, for layers of Opacus and transformers,
which need not be installed.
"""

from grad_samplers import bilinear, conv, elementwise, embedding, embedding_bag, linear, normalization, recurrent
from grad_samplers.readings import per_sample_gradients, per_sample_norms, weighted_sum
from grad_samplers.registry import (
    Sampler,
    lookup,
    reason_unsupported,
    register_grad_sampler,
    register_norm_sampler,
    register_weighted_sampler,
    registered,
    sampler_of,
    unregister,
)

__all__ = [
    "Sampler",
    "bilinear",
    "conv",
    "elementwise",
    "embedding",
    "embedding_bag",
    "linear",
    "lookup",
    "normalization",
    "per_sample_gradients",
    "per_sample_norms",
    "recurrent",
    "reason_unsupported",
    "register_grad_sampler",
    "register_norm_sampler",
    "register_weighted_sampler",
    "registered",
    "sampler_of",
    "unregister",
    "weighted_sum",
]
