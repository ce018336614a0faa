"""The slowest level: an outer learner that reads ordered lanes of text and moves the slow weights after every step.

There are no epochs and no shuffled batches. B lanes read contiguous text; each carries its fast state from step to step,
cut from the graph (detached), and goes back to the start state where the stream says so (a new document) and, so that
the initial states of decaying memories keep getting gradients, at the latest after `carry` steps. What the levels of a
continuum have learned stays a function of their slow weights and step sizes, so that both are trained on carried text too
(see `nestling.layers.carried` for where it does not).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nestling import optim
from nestling import state as fast
from nestling.learn.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_model,
    model_tensors,
    random_state,
    set_random_state,
)
from nestling.learn.evaluation import masks, token_nats
from nestling.models.lm import LanguageModel, ModelState
from nestling.stream import Lanes, Parts


@dataclass(frozen=True)
class StepResult:
    """What one step did. A skipped step read its text and changed no weight; its loss may be nan or inf."""

    step: int
    tokens: int
    """Tokens read in this step, over all lanes."""
    loss: float
    """Cross entropy per predicted token, nats. Tokens that the model refuses predict nothing."""
    bits_per_byte: float
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    faults: int
    """Writes that the fast memories refused in this step because they were not finite, and tokens that the model did."""
    skipped: bool


@dataclass
class Progress:
    """The counters of a run; plain numbers, kept in the checkpoint."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    faults: int = 0
    """Writes refused by the state that is carried now."""
    carried: list[int] = field(default_factory=list)
    """Per lane: steps that its state has been through since it last started afresh, that one included."""


class LearningError(RuntimeError):
    """Learning cannot go on; the message says why and what to change."""


class Learner:
    """One model, one optimizer, one stream; `step()` is the whole loop.

        learner = Learner(model, adamw(model, lr=1e-3), lanes, schedule=lambda tokens: min(1.0, tokens / 10_000))
        for _ in range(100):
            print(learner.step().bits_per_byte)

    Args:
        model: anything that keeps contract C1, on the device it is to run on.
        optimizer: over the model's slow weights; each group's `lr` at this moment is its full learning rate. Or the name
            of one, with the settings of `nestling.optim.from_levels`.
        stream: an endless iterator of batches `[lane, time]` with `state_dict`/`load_state_dict`.
        schedule: multiplier of the learning rate as a function of the tokens read before the step.
        clip: largest global gradient norm; the gradient is scaled down to it.
        carry: steps after which a lane starts afresh at the latest (None: only where the stream says so).
        patience: so many skipped steps in a row raise `LearningError`.
        dtype: bfloat16 runs the slow weights' products under autocast (fast weights stay in at least float32 by C7).
        bytes_per_token: bytes of text a predicted token stands for, on average over the corpus; 1 with the byte
        tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | str,
        stream: Lanes | Parts,
        *,
        schedule: Callable[[int], float] = lambda tokens: 1.0,
        clip: float = 1.0,
        carry: int | None = 64,
        patience: int = 20,
        dtype: torch.dtype | None = None,
        bytes_per_token: float = 1.0,
    ) -> None:
        self.model = model
        self.optimizer = optim.from_levels(model, optimizer) if isinstance(optimizer, str) else optimizer
        self.stream = stream
        self.schedule = schedule
        self.clip = clip
        self.carry = carry
        self.patience = patience
        self.dtype = dtype
        self.bytes_per_token = bytes_per_token
        self.state: Any = None
        self.progress = Progress()
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def step(self) -> StepResult:
        """Read one batch, learn from it, carry on. Raises `LearningError` after `patience` skipped steps in a row."""
        now = self.progress
        batch = next(self.stream)
        reset = self._reset(batch.reset)
        device = self.parameters[0].device
        targets = batch.targets.masked_fill(~batch.loss_mask, -100).to(device)
        predicted = max(int(batch.loss_mask.sum()), 1)

        with self._precision(device):
            logits, state = self.model(batch.tokens.to(device), self._carried(), **masks(reset, batch.valid, device))
        loss = mean_nats(logits, targets, predicted)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        faults = count_faults(state)

        # The step's one wait for the device.
        seen = torch.stack([loss.detach().double(), norm.double(), torch.as_tensor(faults, device=device).double()])
        loss_value, norm_value, faults_value = seen.tolist()
        skipped = not (math.isfinite(loss_value) and math.isfinite(norm_value))

        lr_scale = self.schedule(now.tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        new_faults = max(int(faults_value) - now.faults, 0)
        now.step += 1
        now.tokens += int(batch.valid.sum())
        if skipped:
            self._start_afresh(len(batch.tokens))
            now.skipped += 1
            now.skipped_in_a_row += 1
        else:
            self.state = fast.tree_map(_settle, state)
            now.faults = int(faults_value)
            now.skipped_in_a_row = 0
        if now.skipped_in_a_row >= self.patience:
            raise LearningError(
                f"step {now.step}: the loss or its gradient was not finite {self.patience} times in a row. "
                "Try a lower lr, a longer warmup or a smaller clip."
            )
        return StepResult(
            step=now.step,
            tokens=int(batch.valid.sum()),
            loss=loss_value,
            bits_per_byte=loss_value / math.log(2) / self.bytes_per_token,
            grad_norm=norm_value,
            lr=self.optimizer.param_groups[0]["lr"],
            faults=new_faults,
            skipped=skipped,
        )

    def checkpoint(self, numbers: Mapping[str, Any]) -> Checkpoint:
        """Everything needed to go on, with more `numbers` (JSON) of the caller's; tensors are not copied, so
        save it before the next step.
        """
        return Checkpoint(
            step=self.progress.step,
            model=model_tensors(self.model),
            optimizer=self.optimizer.state_dict(),
            fast=self.state,
            numbers={
                **numbers,
                "progress": asdict(self.progress),
                "cursor": self.stream.state_dict(),
                "random": random_state(self.parameters[0].device),
            },
        )

    def restore(self, saved: Checkpoint) -> None:
        """Go back, or on, to what `checkpoint` returned; raises `CheckpointError` or `stream.StreamError` where
        it does not fit.
        """
        device = self.parameters[0].device
        load_model(self.model, saved.model, f"checkpoint of step {saved.step}")
        try:
            self.optimizer.load_state_dict(saved.optimizer)
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint of step {saved.step}: its optimizer has other groups of parameters than this one ({error}): go on "
                "with the version, the optimizer and the periods that the run was begun with"
            ) from error
        self.stream.load_state_dict(saved.numbers["cursor"])
        self.state = None if saved.fast is None else fast.tree_map(_settle, fast.to(saved.fast, device))
        self.progress = Progress(**saved.numbers["progress"])
        set_random_state(saved.numbers["random"], device)

    def _reset(self, reset: Tensor) -> Tensor:
        """The stream's resets `[lane, time]`, and one at the start of every lane that has been carried long enough."""
        if len(self.progress.carried) != len(reset):
            self._start_afresh(len(reset))
        carried = torch.tensor(self.progress.carried)
        if self.carry is not None:
            reset = reset.clone()
            reset[:, 0] |= carried >= self.carry
        # Where there is no state yet, the reset that opens a lane's text ends nothing.
        afresh = reset if self.state is not None else reset[:, 1:]
        self.progress.carried = torch.where(afresh.any(1), 1, carried + 1).tolist()
        return reset

    def _carried(self) -> Any:
        """What the last step left: a constant, but for the step sizes of levels that have learned by it."""
        # A module around the model does not hand on its methods. Whose state it is where there are several nobody can tell.
        own = [module for module in self.model.modules() if isinstance(module, LanguageModel)]
        if len(own) != 1 or not isinstance(self.state, ModelState):
            return self.state
        return own[0].reattached(self.state)

    def _start_afresh(self, lanes: int) -> None:
        """Every lane back to its start state. What made a step go wrong may sit in the carried state, so a
        skipped step ends so too.
        """
        self.state = None
        self.progress.faults = 0
        # Staggered, so that later the lanes do not all start afresh in the same step.
        self.progress.carried = [lane * (self.carry or 0) // lanes for lane in range(lanes)]

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)


def mean_nats(logits: Tensor, targets: Tensor, predicted: int) -> Tensor:
    """Cross entropy per predicted token, nats, without the costs that are NaN; NaN if all are. Those of tokens that the model
    refuses are, and pass no gradient on. What is NaN for another reason has a gradient that is, so that the step is skipped."""
    nats = token_nats(logits, targets)
    lost = nats.isnan()
    return torch.where(lost, 0.0, nats).sum() / (predicted - lost.sum())


def count_faults(state: Any) -> Tensor | int:
    """How many writes the memories of a state have refused, and how many tokens the model, over all lanes: the sum of its leaves
    named `faults` and `refused`, on the device. A state with a leaf `faults` counts for all inside it. An `open` window holds
    older states of the same memories, which do not count again.
    """
    if isinstance(state, Tensor) or state is None:
        return 0
    names = getattr(state, "_fields", None) or (state.keys() if isinstance(state, dict) else [""] * len(state))
    children = list(zip(names, state.values() if isinstance(state, dict) else state, strict=True))
    found: list[Tensor | int] = [child.sum() for name, child in children if name == "faults"]
    if not found:
        tokens = [child.sum() for name, child in children if name == "refused" and child is not None]
        found = [*tokens, *(count_faults(child) for name, child in children if name != "open")]
    return sum(found)


def _settle(leaf: Tensor) -> Tensor:
    """A leaf cut from the graph and laid out as if it came from a file: matrix products may round otherwise for
    another layout or alignment, and a resumed run is to have the same bits."""
    leaf = leaf.detach().contiguous()
    return leaf.clone() if leaf.device.type == "cpu" and leaf.data_ptr() % 64 else leaf
