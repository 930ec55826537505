"""--optimizer torch_adam: torch.optim.Adam as it is."""

from dataclasses import dataclass
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II


@dataclass
class TorchAdamConfig(FairseqDataclass):
    lr: List[float] = II("optimization.lr")


@register_optimizer("torch_adam", dataclass=TorchAdamConfig)
class TorchAdam(FairseqOptimizer):
    """fairseq's own adam adds epsilon before the bias correction of the second moment, which is 30 times as large
    an epsilon in the first updates: enough to leave the authors' logs within some hundred steps."""

    def __init__(self, cfg: TorchAdamConfig, params):
        super().__init__(cfg)
        self._optimizer = torch.optim.Adam(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        return {"lr": self.cfg.lr[0]}
