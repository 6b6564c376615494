"""Adding losses to a Hugging Face model
=====================================

The losses take the tensors that a `CLIPModel` of the ``transformers`` library returns, so the model
does not change. One loss aligns the embeddings of image and text, another the tokens and patches of
each pair, where the attention mask of the text marks the tokens that are not padding.

The model is tiny, starts from random weights and trains on a CPU in seconds. Its images are
scikit-learn's handwritten digits; its captions are their names, with a token for each letter.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import CLIPOutput

from multialign import MMDLoss

# %%
# Captions and images
# -------------------
# Captions differ in length, so they are padded, and the attention mask is 0 on padding.

digits = load_digits()
labels = torch.as_tensor(digits.target)
images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
images = interpolate(images, size=16).expand(-1, 3, -1, -1)

START, END, LENGTH = 27, 28, 7
words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
spelled = [[START, *(ord(letter) - ord("a") + 1 for letter in word), END] for word in words]
tokens = torch.tensor([ids + [0] * (LENGTH - len(ids)) for ids in spelled])
attention = torch.tensor([[1] * len(ids) + [0] * (LENGTH - len(ids)) for ids in spelled])

# %%
# The model
# ---------
# For pretrained weights, use ``CLIPModel.from_pretrained(name)`` here. The rest of the page does
# not depend on it.


def make_model() -> CLIPModel:
    """Return a CLIP model with one layer in each tower and random weights."""
    layer = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    text = {**layer, "vocab_size": 29, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    vision = {**layer, "image_size": 16, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


# %%
# Two places for a loss
# ---------------------
# ``text_embeds`` and ``image_embeds`` are the batch's unit vectors, `(B, D)`: two modalities of B
# samples.
#
# Tokens and patches are `(B, 7, D)` and `(B, 17, D)`: B independent problems of 7 and 17 samples.
# The attention mask is used as the weights of the first; padding is absent, whatever the model
# computes there.

align = MMDLoss(bandwidth=[0.25, 0.5, 1.0])


def on_embeddings(model: CLIPModel, outputs: CLIPOutput, mask: Tensor) -> Tensor:
    """Align the embeddings of the batch."""
    return align([outputs.text_embeds, outputs.image_embeds])


def on_tokens(model: CLIPModel, outputs: CLIPOutput, mask: Tensor) -> Tensor:
    """Align the tokens of each caption with the patches of its image."""
    text = model.text_projection(outputs.text_model_output.last_hidden_state)
    vision = model.visual_projection(outputs.vision_model_output.last_hidden_state)
    return align([normalize(text, dim=-1), normalize(vision, dim=-1)], [mask.bool(), None])


# %%
# Training
# --------
# CLIP's own loss treats every other caption of the batch as wrong. Here many captions in a batch
# are equal, so the target distribution is uniform over the equal ones.

TEST = 400


def train(
    extra: Callable[..., Tensor] | None, weight: float = 1.0, steps: int = 250
) -> tuple[list[float], float]:
    """Return the gap between the mean embeddings at each step, and the test accuracy."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    gaps = []
    for _ in range(steps):
        rows = torch.randint(TEST, len(images), (64,))
        y = labels[rows]
        outputs = model(input_ids=tokens[y], attention_mask=attention[y], pixel_values=images[rows])
        target = (y[:, None] == y).float()
        target = target / target.sum(1, keepdim=True)
        loss = -(outputs.logits_per_image.log_softmax(1) * target).sum(1).mean()
        if extra is not None:
            loss = loss + weight * extra(model, outputs, attention[y])  # the added line
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gap = outputs.text_embeds.mean(0) - outputs.image_embeds.mean(0)
        gaps.append(gap.norm().item())
    with torch.no_grad():
        outputs = model(input_ids=tokens, attention_mask=attention, pixel_values=images[:TEST])
    right = outputs.logits_per_image.argmax(1) == labels[:TEST]
    return gaps, 100 * right.float().mean().item()


RUNS = {
    "contrastive alone": None,
    "+ MMD on embeddings": on_embeddings,
    "+ MMD on tokens": on_tokens,
}
outcomes = {name: train(extra) for name, extra in RUNS.items()}
for name, (gaps, accuracy) in outcomes.items():
    print(f"{name:20} gap {gaps[-1]:.2f}, digits named correctly {accuracy:.0f} %")

# %%
# What to see
# -----------
# The contrastive loss alone leaves the two modalities in different parts of the sphere, which is
# the modality gap :cite:p:`liang:22`. The loss on the embeddings closes most of it. The accuracies
# are those of one seed and of 400 samples, with a standard error of two points or more. They show
# only that accuracy is not reduced. :doc:`/gallery/plot_modality_gap` shows the use of a closed
# gap.

figure, axis = plt.subplots(figsize=(6, 3.2))
for (name, (gaps, accuracy)), colour in zip(
    outcomes.items(), ("0.45", "#0072B2", "#E69F00"), strict=True
):
    axis.plot(gaps, c=colour, lw=1.4, label=f"{name} ({accuracy:.0f} % named)")
axis.set(xlabel="step", ylabel="distance of the mean embeddings", ylim=(0, None))
axis.legend()
plt.show()
