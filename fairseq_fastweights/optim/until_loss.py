"""--lr-scheduler until_loss: a constant rate, and the end of training when the validation loss is low enough."""

from dataclasses import dataclass, field
from typing import List

from fairseq import checkpoint_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II


@dataclass
class UntilLossConfig(FairseqDataclass):
    target_loss: float = field(
        default=0.001,
        metadata={"help": "validation loss at which training ends (with --stop-min-lr 0)"},
    )
    lr: List[float] = II("optimization.lr")


@register_lr_scheduler("until_loss", dataclass=UntilLossConfig)
class UntilLoss(FairseqLRScheduler):
    """fairseq ends training when the rate is at most --stop-min-lr: here it is 0 from the target loss on."""

    def __init__(self, cfg: UntilLossConfig, optimizer):
        super().__init__(cfg, optimizer)
        self.reached = False
        self.optimizer.set_lr(cfg.lr[0])

    def step(self, epoch, val_loss=None):
        """After an epoch's validation; and after a resume, where the best loss so far is all that fairseq kept."""
        super().step(epoch, val_loss)
        loss = getattr(checkpoint_utils.save_checkpoint, "best", None) if val_loss is None else val_loss
        self.reached = self.reached or (loss is not None and loss <= self.cfg.target_loss)
        return self.step_update(0)

    def step_update(self, num_updates):
        self.optimizer.set_lr(0.0 if self.reached else self.cfg.lr[0])
        return self.optimizer.get_lr()
