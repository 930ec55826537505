"""What a task needs of optimizers and learning rates beside fairseq's own."""

from . import torch_adam, until_loss  # noqa: F401
