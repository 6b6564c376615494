"""The text encoder that is trained with the model, such as BERT, from token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Text", "TextEncoder"]


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text encoder and how it is trained.

    Args:
        name: A model of `transformers`: its folder, or its name on the hub
            ("bert-base-uncased", or "bert-base-chinese" for CH-SIMS).
        frozen: Whether its weights are not trained.
        learning_rate: The learning rate of its weights; that of the other weights if None.
    """

    name: str = "bert-base-uncased"
    frozen: bool = False
    learning_rate: float | None = None


class TextEncoder(nn.Module):
    """The last hidden states of a pretrained transformer.

    Args:
        text: The model and its options.
    """

    def __init__(self, text: Text) -> None:
        super().__init__()
        from transformers import AutoModel

        self.frozen = text.frozen
        self.transformer = AutoModel.from_pretrained(text.name).float()
        # The pooler's output is not used, so no gradient would reach its weights.
        if getattr(self.transformer, "pooler", None) is not None:
            self.transformer.pooler = None
        self.transformer.requires_grad_(not text.frozen)
        # `from_pretrained` returns the model in evaluation mode.
        self.train()

    @property
    def width(self) -> int:
        """The features of a token."""
        return int(self.transformer.config.hidden_size)

    def train(self, mode: bool = True) -> TextEncoder:
        """Set the mode; a frozen encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.frozen:
            self.transformer.eval()
        return self

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(N, T, width)` and the valid steps from ids, mask and segments `(N, 3, T)`."""
        ids, mask, segments = tokens.long().unbind(1)
        arguments = {"input_ids": ids, "attention_mask": mask}
        # A missing text has no token, and the softmax over no token would be NaN.
        absent = (mask == 0).all(1, keepdim=True)
        arguments["attention_mask"] = torch.where(absent, 1, mask)
        if getattr(self.transformer.config, "type_vocab_size", 0) > 1:
            arguments["token_type_ids"] = segments
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = self.transformer(**arguments).last_hidden_state
        return states, mask > 0
