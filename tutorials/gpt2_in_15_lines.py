"""GPT-2, fine-tuned privately in 15 lines. Tied weights and all, the model is transformers' own."""

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from gsm import make_private
from gsm.transformers import per_sample_loss

model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4)).train()  # or .from_pretrained("gpt2")
texts = torch.randint(0, 50257, (128, 16))  # one row of token ids per record
optimizer, loader = torch.optim.AdamW(model.parameters(), lr=1e-3), DataLoader(texts, batch_size=32)
model, optimizer, loader = make_private(model, optimizer, loader, target_epsilon=3.0, target_delta=1e-4, epochs=1)
for ids in loader:
    optimizer.zero_grad()
    loss = per_sample_loss(model(input_ids=ids), ids).mean()
    loss.backward()
    optimizer.step()
print(f"privacy spent: epsilon = {optimizer.accountant.get_epsilon(delta=1e-4):.2f} at delta = 1e-4")
