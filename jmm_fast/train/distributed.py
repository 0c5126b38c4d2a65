"""Several processes that train or evaluate together, as ``torchrun`` starts them. A single process needs none of it.

A batch is that of all processes: each computes the gradient of its part, and the update is that of the whole. Files,
lines and progress are the business of the first process (rank 0).
"""

import contextlib
import datetime
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from jmm_fast.errors import SharedError, UserError
from jmm_fast.files import locked
from jmm_fast.models.blocks import DropPath
from jmm_fast.train import sharding

T = TypeVar("T")


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the other processes that ``torchrun`` started; does nothing in a process that was started alone.

    gloo between CPUs, nccl between GPUs. ``JMM_FAST_TIMEOUT`` (seconds, default 600): how long one process waits for
    the others before it gives up.

    Raises:
        UserError: the others cannot be found, or one of them died.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    text = os.environ.get("JMM_FAST_TIMEOUT", "600")
    try:
        timeout = datetime.timedelta(seconds=float(text))
    except ValueError as error:
        raise SharedError(f"JMM_FAST_TIMEOUT is {text!r}: expected seconds") from error
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=_fresh(store, number, timeout),
            rank=number,
            world_size=count,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise _said(
            UserError(f"cannot join the other processes that torchrun started: {_first_line(error)}")
        ) from error
    try:
        yield
    except SharedError:
        _leave()
        raise
    except UserError as error:
        raise _said(error) from error
    except RuntimeError as error:
        if not _contact_lost(error):
            raise
        line = "lost contact with the other processes: one of them has died or the network has failed; "
        line += f"pretrain and finetune continue with --resume ({_first_line(error)})"
        raise _said(UserError(line)) from error
    except KeyboardInterrupt as stop:
        # A stop with a signal's number all processes agreed on; at another one the rest may be in an exchange for long.
        if hasattr(stop, "signum"):
            _leave()
        raise
    _leave()


def device_index(count: int) -> int:
    """Which of the ``count`` GPUs of this machine is this process's.

    Raises:
        UserError: there are more processes on this machine than GPUs.
    """
    local = int(os.environ.get("LOCAL_RANK", 0)) if size() > 1 else 0
    if local >= count:
        raise UserError(f"{count} GPUs on this machine: expected at most as many processes (torchrun --nproc-per-node)")
    return local


def gather(value: T) -> list[T]:
    """``value`` of every process, by rank. Every process must call it."""
    if size() == 1:
        return [value]
    values: list = [None] * size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """``work()`` in every process; when it is refused in one, all refuse.

    Raises:
        UserError: what the first process in which it was refused said.
    """
    result, complaint = None, None
    try:
        result = work()
    except UserError as error:
        if size() == 1:
            raise
        complaint = str(error)
    complaints = gather(complaint)
    for number, text in enumerate(complaints):
        if text is not None:
            alone = number or complaints.count(text) < len(complaints)
            raise SharedError(f"rank {number}: {text}" if alone else text)
    return result


def from_first(work: Callable[[], T]) -> T:
    """``work()`` of the first process, in every process; what it raises as a :class:`UserError`, all raise."""
    if size() == 1:
        return work()
    sent: list = [None, None]
    if is_first():
        try:
            sent[0] = work()
        except UserError as error:
            sent[1] = str(error)
    dist.broadcast_object_list(sent)
    if sent[1] is not None:
        raise SharedError(sent[1])
    return sent[0]


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold ``folder`` (:func:`jmm_fast.files.locked`) in the first process; where that cannot be, all refuse."""
    with contextlib.ExitStack() as held:
        from_first(lambda: held.enter_context(locked(folder)))
        yield


def in_order(mine: Iterator[T], count: int) -> Iterator[T]:
    """Items 0 to ``count - 1`` in every process, of which process ``r`` of ``n`` makes ``r, r + n, ...``.

    Args:
        mine: makes this process's items, in order.
    """
    if size() == 1:
        yield from mine
        return
    mine = iter(mine)
    for first in range(0, count, size()):
        item = next(mine) if first + rank() < count else None
        yield from islice(gather(item), count - first)


class Exchange:
    """What the processes tell each other after every step: its clips, a signal to stop, a checkpoint that is wanted.

    Between hosts, 32 bytes: nobody waits for a GPU. Nor for the slowest process: the sum over all is on its way while
    the next step computes, and is read after that, by all processes after the same step. A single process has nothing
    to wait for.
    """

    def __init__(self) -> None:
        self._under_way: list[tuple[dist.Work, Tensor]] = []

    def __call__(self, samples: int, stop: int, wanted: bool, *, now: bool) -> tuple[int, int, bool]:
        """Tell the others of a step and learn of the step before; ``now``: of this one too.

        Args:
            samples: clips of this process.
            stop: SIGINT or SIGTERM, when it came, else 0.
            wanted: whether a checkpoint is.

        Returns:
            The same of all processes together: clips, SIGTERM rather than SIGINT, whether one wants a checkpoint.
        """
        if size() == 1:
            return samples, stop, wanted
        mine = torch.tensor([samples, stop == signal.SIGINT, stop == signal.SIGTERM, wanted])
        self._under_way.append((dist.all_reduce(mine, async_op=True), mine))
        total = torch.zeros_like(mine)
        # Nothing stays under way when all are about to stop.
        while self._under_way and (now or len(self._under_way) > 1 or total[1:3].any()):
            work, found = self._under_way.pop(0)
            work.wait()
            total += found
        samples, interrupts, ends, wishes = total.tolist()
        stop = signal.SIGTERM if ends else signal.SIGINT if interrupts else 0
        return samples, int(stop), wishes > 0


def only_first(say: Callable[[str], None]) -> Callable[[str], None]:
    """``say`` in the first process, silence in the others."""
    return say if is_first() else _silence


def check_batch(name: str, batch_size: int, accumulate: int = 1) -> None:
    """Refuse a batch that does not give every process a clip.

    Raises:
        UserError: names the setting.
    """
    if batch_size < size() * accumulate:
        parts = f"{size()} processes" + (f" in {accumulate} parts each (accumulate)" if accumulate > 1 else "")
        raise SharedError(f"{name} is {batch_size}: it is the batch of all processes, expected at least {parts}")


def share_drop_path(model: nn.Module, bodies: int) -> None:
    """Let every process draw the drop path of the whole batch and use the rows of its own ``bodies``.

    So the draws are those of a single process, which has the same generator.
    """
    if size() == 1:
        return
    counts = gather(bodies)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.share = (sum(counts[: rank()]), sum(counts))


def gather_rows(rows: Tensor) -> Tensor:
    """Rows ``[N_r, ...]`` of every process, one below the other by rank: ``[sum N_r, ...]``.

    Differentiable where every process computes the same loss from the result: the gradient of ``rows`` is then ``n``
    times what that loss gives, which the mean over ``n`` processes brings back to the gradient of the one loss.
    """
    return rows if size() == 1 else _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        counts = gather(len(rows))
        ctx.start = sum(counts[: rank()])
        ctx.count = len(rows)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient[ctx.start : ctx.start + ctx.count] * size()


class Shared:
    """Gradients of a batch that several processes, or several passes one after the other, compute in parts.

    Part ``p`` of the batch has the loss ``l_p``, a mean over ``w_p`` terms (masked tokens). What is computed is the
    gradient of ``sum_p w_p l_p / sum_p w_p``, the mean over all terms of the batch, however it is cut; equal for any
    number of processes and parts but for rounding. DistributedDataParallel, or FSDP2 where the network is in shards,
    sums over processes while the last part's backward pass still runs. Where steps are captured, gradients lie in one
    piece of memory that the processes add up in one call, after the graph: nobody talks in the middle of it.

    Args:
        model: what is trained; all processes take the weights of the first. In place in shards, where it is sharded.
        optimizer: of ``model``, before its first step; made to update the shards.
        loss_of: ``(batch, epoch) -> (loss, weight)``.
        accumulate: parts that each process makes of its share.
        shard: ``full``: several processes share weights, gradients and optimiser state.
        captured: :meth:`own` is captured and repeated; by several processes, in one part, without shards.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable,
        accumulate: int,
        shard: Literal["none", "full"] = "none",
        captured: bool = False,
    ) -> None:
        self.model, self.accumulate = model, accumulate
        self.objective: nn.Module = _Objective(model, loss_of)
        self.sharded = size() > 1 and shard == "full"
        self.together: _Together | None = None
        if self.sharded:
            assert not captured, "shards come together in the middle of a step"
            sharding.shard(self.objective, model, optimizer)
        elif captured:
            assert size() > 1 and accumulate == 1, "what is captured is one part of what several processes compute"
            self.together = _Together(model)
        elif size() > 1:
            kind = nn.parallel.DistributedDataParallel
            # Buffers are computed alike everywhere. The option has another name from torch 2.13 on.
            known = inspect.signature(kind).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.objective = kind(self.objective, gradient_as_bucket_view=True, **{buffers: False})

    def backward(self, batch, epoch: int, context: Callable) -> Tensor:
        """Leave the gradient of the whole batch's loss in the parameters and return that loss, on the device.

        Args:
            batch: this process's share.
            context: makes the context of a forward pass.
        """
        return self.combine(self.own(batch, epoch, context))

    def own(self, batch, epoch: int | Tensor, context: Callable) -> Tensor:
        """The first half of :meth:`backward`, which asks no other process where it is captured.

        Returns:
            ``[2]``: of this share the sum of the loss over its terms, and their number.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=batch.clips.device)
        if self.together is not None:
            self.together.clear()
        parts = [batch] if self.accumulate == 1 else batch.split(self.accumulate)
        for number, part in enumerate(parts):
            with self._summing(number + 1 == len(parts)):
                with record_function("forward"), context():
                    loss, terms = self.objective(part, epoch)
                with record_function("backward"):
                    (loss * terms).backward()
            # A number of the host goes to the device as a kernel's argument: a copy would be waited for.
            terms = terms.double() if isinstance(terms, Tensor) else torch.full_like(sums[0], terms)
            # A part without terms has no mean.
            sums += torch.stack([torch.where(terms > 0, loss.detach() * terms, 0.0), terms])
        return sums

    def combine(self, sums: Tensor) -> Tensor:
        """The second half of :meth:`backward`, from what :meth:`own` gave."""
        if size() > 1:
            dist.all_reduce(sums)
        total, weight = sums[0], sums[1].clamp(min=1)
        if self.together is not None:
            dist.all_reduce(self.together.gradients)
            self.together.gradients.div_(weight)
        else:
            gradients = [sharding.local(value.grad) for value in self.model.parameters() if value.grad is not None]
            # DistributedDataParallel and FSDP2 leave the mean over processes.
            torch._foreach_mul_(gradients, size() / weight)
        return (total / weight).float()

    def _summing(self, last: bool) -> contextlib.AbstractContextManager:
        """Context of a part: gradients are summed over processes after the ``last`` alone."""
        if self.sharded:
            self.objective.set_requires_gradient_sync(last)
        return contextlib.nullcontext() if last or self.sharded or size() == 1 else self.objective.no_sync()


class _Together:
    """The gradients of all parameters, one behind the other in one tensor; the weights become the first process's."""

    GRAIN = 32  # floats: each gradient begins where kernels read whole vectors

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        lengths = [-(-parameter.numel() // self.GRAIN) * self.GRAIN for parameter in self.parameters]
        self.gradients = torch.zeros(sum(lengths), device=self.parameters[0].device)
        pieces = zip(self.gradients.split(lengths), self.parameters, strict=True)
        self.views = [piece[: parameter.numel()].view_as(parameter) for piece, parameter in pieces]
        for value in model.state_dict().values():
            dist.broadcast(value, src=0)

    def clear(self) -> None:
        """Zero, and where the next backward pass adds its gradients."""
        self.gradients.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view


class _Objective(nn.Module):
    """The loss as a module's forward pass, which is where DistributedDataParallel prepares itself."""

    def __init__(self, model: nn.Module, loss_of: Callable) -> None:
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, batch, epoch: int):
        return self.loss_of(batch, epoch)


def _fresh(store: dist.Store, number: int, timeout: datetime.timedelta) -> dist.Store:
    """A part of ``store`` that this start of the processes has for itself.

    torchrun keeps one store over restarts (torch 2.13), in which the addresses of the dead would be found. The first
    process opens the next part; another takes the newest in which no earlier process stood in its place.
    """
    if number == 0:
        return dist.PrefixStore(f"start {store.add('start', 1)}", store)
    limit = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < limit:
        newest = store.add("start", 0)
        if newest and store.add(f"start {newest} rank {number}", 1) == 1:
            return dist.PrefixStore(f"start {newest}", store)
        time.sleep(0.05)
    raise RuntimeError("the first process did not come")


def _leave() -> None:
    # The group's threads let go of a tensor a little after it was exchanged, and need the interpreter for that. If the
    # group is dropped in this moment, with the interpreter's lock held, it waits for them for ever (torch 2.13, gloo).
    time.sleep(0.2)
    dist.destroy_process_group()


def _contact_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error).lower() for word in ("gloo", "nccl", "connection closed", "timed out"))


def _said(error: UserError) -> UserError:
    """``error`` to be raised, told here and now unless this is the first process, whose command line tells it."""
    number = os.environ.get("RANK", "0")
    if number == "0":
        return error
    print(f"jmm-fast: rank {number}: error: {error}", file=sys.stderr, flush=True)
    return SharedError(str(error))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def _silence(_text: str) -> None:
    pass
