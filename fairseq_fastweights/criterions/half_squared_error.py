"""--criterion half_squared_error: 1/2 |y - one_hot(target)|^2, the loss of the paper's section 6.1."""

import torch
import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics


@register_criterion("half_squared_error", dataclass=FairseqDataclass)
class HalfSquaredError(FairseqCriterion):
    """Summed over the components, averaged over a batch; a validation averages its batches with equal weights."""

    def forward(self, model, sample, reduce=True):
        out = model(**sample["net_input"])  # (B, values)
        wanted = F.one_hot(sample["target"], out.shape[-1]).to(out.dtype)
        loss = (0.5 * (wanted - out).pow(2)).sum()
        size = len(sample["target"])
        correct = (out.argmax(-1) == sample["target"]).sum()
        logged = {
            "loss": loss.data,
            "correct": correct.data,
            "sample_size": size,
            "nsentences": size,
            "ntokens": size,
        }
        return loss, size, logged

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        def total(name):
            return sum(torch.as_tensor(log[name]).item() for log in logging_outputs)

        metrics.log_scalar("loss", total("loss") / total("sample_size"), 1)
        metrics.log_scalar("accuracy", total("correct") / total("sample_size"), 1, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
