"""Adapters of peft with random weights, as if they had been trained."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def train_at_random(model: Any) -> None:
    """Give the LoRA of a peft model, and what else trains with it, seeded random weights."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_magnitude" in name:
            weight.mul_(torch.rand_like(weight) + 0.5)
        elif "lora_" in name:
            weight.normal_(0, 0.2)
        elif weight.requires_grad:
            weight.add_(torch.randn_like(weight) * 0.1)
