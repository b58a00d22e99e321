"""What training minimises: cross-entropy, and three helpers that make a small model learn to listen quickly.

Knows nothing about optimisers or data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.demo.train.data import Batch
from pipeline.demo.train.net import N_ORDERS, Decoded, Net
from pipeline.demo.train.targets import IGNORED

# Head 0 of these decoder layers must look at the word it writes: they become the model's alignment heads.
ALIGNMENT_LAYERS = (1, 2)

_CTC, _GUIDE, _ORDER = 0.4, 0.25, 0.15
_NEIGHBOUR = 0.2  # of a timestamp's probability goes to each of the two beside it


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """A `Batch` on the device; fields as there."""

    mels: Tensor
    first_positions: Tensor
    tokens: Tensor
    slots: Tensor
    labels: Tensor
    spans: Tensor
    orders: Tensor
    position_orders: Tensor
    characters: Tensor
    n_characters: Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars. The accuracies are teacher-forced: of text tokens, and of timestamps within 0.04 s."""

    cross_entropy: Tensor
    ctc: Tensor
    guide: Tensor
    order: Tensor
    text_accuracy: Tensor
    timestamp_accuracy: Tensor

    @property
    def total(self) -> Tensor:
        return self.cross_entropy + _CTC * self.ctc + _GUIDE * self.guide + _ORDER * self.order

    def values(self) -> Tensor:
        """[6] in the order of the fields, free of the graph and still on the device."""
        return torch.stack([getattr(self, name).detach().float() for name in Losses.__slots__])


def to_device(batch: Batch, device: torch.device) -> BatchTensors:
    """All arrays of a batch as tensors on `device`."""
    arrays = (getattr(batch, name) for name in BatchTensors.__slots__)
    return BatchTensors(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


def compute_losses(net: Net, batch: BatchTensors) -> Losses:
    """One forward pass in bf16; all losses in float32."""
    with torch.autocast(batch.mels.device.type, torch.bfloat16):
        memory = net.encode(batch.mels, batch.first_positions)
        decoded = net.decode(batch.tokens, batch.slots, memory, ALIGNMENT_LAYERS)
        characters = net.character_head(memory)
        heard_order = net.heard_order_head(memory)
    log_probabilities = decoded.logits.log_softmax(-1)
    timestamps = _timestamp_rows(net, batch.labels)
    text_accuracy, timestamp_accuracy = _accuracies(log_probabilities, batch.labels, timestamps)
    return Losses(
        cross_entropy=_cross_entropy(net, log_probabilities, batch.labels, timestamps),
        ctc=_ctc(characters, batch),
        guide=_guide(decoded, batch),
        order=_order(heard_order, batch.position_orders) + _order(decoded.orders, batch.orders),
        text_accuracy=text_accuracy,
        timestamp_accuracy=timestamp_accuracy,
    )


def _timestamp_rows(net: Net, labels: Tensor) -> Tensor:
    """[b, l]: which labels are timestamps. They are the last rows before the dummy one."""
    last = net.config.n_rows - 1
    return (labels >= last - net.config.n_timestamps) & (labels < last)


def _cross_entropy(net: Net, log_probabilities: Tensor, labels: Tensor, timestamps: Tensor) -> Tensor:
    """Over all labels; a timestamp's is spread over its neighbours, since 20 ms off is almost right."""
    last = net.config.n_rows - 2
    first = last - net.config.n_timestamps + 1
    known = labels.clamp(min=0)
    below, above = (known - 1).clamp(min=first), (known + 1).clamp(max=last)

    def loss_of(rows: Tensor) -> Tensor:
        return -log_probabilities.gather(-1, rows[..., None])[..., 0]

    exact = loss_of(known)
    around = loss_of(torch.where(timestamps, below, known)) + loss_of(torch.where(timestamps, above, known))
    spread = (1 - 2 * _NEIGHBOUR) * exact + _NEIGHBOUR * around
    counted = labels != IGNORED
    return (torch.where(timestamps, spread, exact) * counted).sum() / counted.sum()


def _accuracies(log_probabilities: Tensor, labels: Tensor, timestamps: Tensor) -> tuple[Tensor, Tensor]:
    best = log_probabilities.argmax(-1)
    text = (labels != IGNORED) & ~timestamps
    right = ((best == labels) & text).sum() / text.sum()
    near = (((best - labels).abs() <= 2) & timestamps).sum() / timestamps.sum().clamp(min=1)
    return right, near


def _ctc(logits: Tensor, batch: BatchTensors) -> Tensor:
    """Characters from the encoder alone, a character's mean: the encoder learns to hear before the decoder can."""
    n_windows, n_positions = logits.shape[:2]
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    lengths = torch.full((n_windows,), n_positions, device=logits.device)
    losses = F.ctc_loss(
        log_probabilities, batch.characters, lengths, batch.n_characters, reduction="none", zero_infinity=True
    )
    return (losses / batch.n_characters.clamp(min=1)).mean()


def _guide(decoded: Decoded, batch: BatchTensors) -> Tensor:
    """Minus the log of the attention that falls on the positions where the token is heard."""
    window, slot = ((batch.spans[..., 0] >= 0) & (batch.labels != IGNORED)).nonzero(as_tuple=True)
    if not len(window):
        return torch.zeros((), device=batch.spans.device)
    first, last = batch.spans[window, slot].unbind(-1)
    positions = torch.arange(batch.position_orders.shape[1], device=first.device)
    outside = (positions < first[:, None]) | (positions >= last[:, None])
    masses = [
        alignment[window, slot].masked_fill(outside, -30.0).logsumexp(-1).clamp(min=-12.0).mean()
        for alignment in decoded.alignments
    ]
    return -torch.stack(masses).mean()


def _order(logits: Tensor, orders: Tensor) -> Tensor:
    """Which sentence of the window this is: alike sentences in a long window are told apart by their order."""
    if not bool((orders != IGNORED).any()):
        return torch.zeros((), device=logits.device)
    return F.cross_entropy(logits.float().reshape(-1, N_ORDERS), orders.reshape(-1), ignore_index=IGNORED)
