"""Which optimizer steps update the weights: not those whose loss or gradient is not finite, nor, if asked, whose loss
is a spike.

    last micro-step   loss of this rank not finite, or mean loss of all ranks a spike  ->  loss * NaN, on the device
    backward          the gradients are then NaN, on every rank once they are reduced
    update            DeepSpeed looks at the norm of all ranks' gradients, and leaves the update out

So one path serves all causes, and the host waits for nothing that it did not wait for before. (An infinite loss may
well have finite gradients, so the gradients alone do not tell.) A skipped step has consumed its batch, and the schedule
goes on; weights, moments and momentum are those before, bit for bit (deepspeed 0.19.8).

A spike is a mean cross-entropy above spike_factor times the median of the last HISTORY steps that updated the weights.
PaLM (arXiv 2204.02311, 5.1) went back and left out the batches around a spike; to skip the one step, decided on the
device, is OLMo-core's way. Where the loss stays up the weights are to blame, not a batch: such steps count towards the
same limit, and the run ends instead of taking them for the new normal.

The limit counts steps in a row, since there is no loss scale here that would have to be found by trying: a bad batch or
a flipped bit costs one step, and a model that has diverged every step. The default tells these apart, and the rare run
that loses a step is no less an ablation's, for it says so.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

HISTORY = 32  # losses whose median a spike is compared with; there is none before so many


class LossSpike(RuntimeError):
    """More steps in a row were skipped for a spike of the loss than run.train.max_skipped_steps allows."""


class Skipped(NamedTuple):
    """A step whose update was left out. All ranks know the same."""

    ranks: list[int]  # whose loss was not finite
    spike: float | None  # the mean cross-entropy, if it was a spike
    in_a_row: int  # such steps up to this one

    def __str__(self) -> str:
        if self.spike is not None:
            return f"a spike of the loss to {self.spike:.4g}"
        if self.ranks:
            return f"the loss is not finite on rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}"
        return "the losses are finite, but the gradients' norm is not"


class UpdateGuard:
    """Around every optimizer step of an engine: `loss` in every micro-step, and `after_update` once.

    Args:
        spike_factor: of run.train; None: no spike is looked for.
    """

    engine: Any

    def __init__(self, spike_factor: float | None) -> None:
        self.spike_factor = spike_factor
        self.skipped_steps = 0  # of the run, for any cause
        self.skipped_spikes = 0  # of these, for a spike
        self.in_a_row = 0
        self.accepted: deque[Tensor] = deque(maxlen=HISTORY)  # losses, on the device
        self.total: Tensor | float = 0.0  # of this step and rank, over its micro-steps
        self.cross_entropy: Tensor | float = 0.0
        self.micro_steps = 0
        self.mean: Tensor | None = None  # cross-entropy of the step over all ranks
        self.is_spike: Tensor | None = None
        self.withheld = False  # the gradients, of the last update

    def watch(self, engine: Any) -> None:
        """Whose steps they are, before the first."""
        self.engine = engine
        if isinstance(engine.optimizer, torch.optim.Optimizer):  # ZeRO-0 in fp32: DeepSpeed does not wrap it
            engine.optimizer.register_step_pre_hook(self._withhold)

    def loss(self, loss: Tensor, cross_entropy: Tensor) -> Tensor:
        """The loss to run backwards from: as it is, or NaN in the last micro-step of a step that must not update."""
        self.total = self.total + loss.detach().double()
        self.cross_entropy = self.cross_entropy + cross_entropy.double()
        self.micro_steps += 1
        if not self.engine.is_gradient_accumulation_boundary():
            return loss
        poisoned = ~torch.isfinite(self.total)
        if self.spike_factor is not None:
            mean = self.cross_entropy / (self.micro_steps * dist.get_world_size())
            dist.all_reduce(mean)
            self.mean = mean
            if len(self.accepted) == HISTORY:
                self.is_spike = mean > self.spike_factor * median(self.accepted)
                poisoned = poisoned | self.is_spike
        return loss * torch.where(poisoned, torch.nan, 1.0).to(loss.dtype)

    def after_update(self) -> Skipped | None:
        """After the last engine.step() of a step: None if it updated the weights. All ranks call this."""
        made = self.engine.was_step_applied() and not self.withheld
        total, mean, is_spike = self.total, self.mean, self.is_spike
        self.total, self.cross_entropy, self.micro_steps, self.mean, self.is_spike = 0.0, 0.0, 0, None, None
        if made:
            self.in_a_row = 0
            if mean is not None:
                self.accepted.append(mean)
            return None

        self.skipped_steps += 1
        self.in_a_row += 1
        ranks = ranks_where(~torch.isfinite(torch.as_tensor(total)), self.engine.device)
        spike = mean.item() if mean is not None and is_spike is not None and bool(is_spike) and not ranks else None
        self.skipped_spikes += spike is not None
        return Skipped(ranks, spike, self.in_a_row)

    @torch.no_grad()
    def _withhold(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before an update that nobody looks at: take away gradients that are not finite, and torch passes over the
        parameters. They are equal on all ranks. The host waits for the device, as it does in the steps of ZeRO.
        """
        parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        norm = torch.nn.utils.get_total_norm([each.grad for each in parameters])
        self.withheld = not bool(torch.isfinite(norm))
        if self.withheld:
            for each in parameters:
                each.grad = None

    def metrics(self) -> dict[str, float]:
        """The run's count of steps without an update, once there are any."""
        found = {"train/skipped_steps": self.skipped_steps, "train/skipped_spikes": self.skipped_spikes}
        return {name: float(count) for name, count in found.items() if count}

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON. The host waits for the device if spikes are looked for."""
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_spikes": self.skipped_spikes,
            "in_a_row": self.in_a_row,
            "accepted": torch.stack(list(self.accepted)).tolist() if self.accepted else [],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned; from nothing, where nothing was kept."""
        if not state:
            return
        self.skipped_steps, self.skipped_spikes = state["skipped_steps"], state["skipped_spikes"]
        self.in_a_row = state["in_a_row"]
        losses = torch.tensor(state["accepted"], dtype=torch.float64, device=self.engine.device)
        self.accepted = deque(losses, maxlen=HISTORY)


def median(losses: deque[Tensor]) -> Tensor:
    """The mean of the two in the middle, on the device."""
    middle = len(losses) // 2
    return torch.stack(list(losses)).sort().values[middle - 1 : middle + 1].mean()


def ranks_where(flag: Tensor, device: torch.device | str) -> list[int]:
    """The ranks whose flag is set. All ranks call this, and the host waits for the device."""
    flags = torch.zeros(dist.get_world_size(), device=device)
    flags[dist.get_rank()] = flag.to(device)
    dist.all_reduce(flags)
    return flags.nonzero().flatten().tolist()
