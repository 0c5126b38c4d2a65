"""A training step as CUDA graphs: the host starts all of it with one call.

A graph repeats the same kernels on the same addresses with the same numbers. What changes from step to step therefore
lies in memory that is filled before: the draft of the batch (with the epoch, which the mask is drawn from) and the
learning rates. Shapes are part of a graph, so there is one for each number of bodies and clips that is met.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from jmm_fast.data import Draft
from jmm_fast.errors import SharedError
from jmm_fast.models.blocks import DropPath
from jmm_fast.train import distributed

Work = Callable[[], tuple[Tensor, ...]]
LIMIT = 64
"""Graphs that are kept. A batch of 48 clips of one or two bodies has some twenty numbers of bodies."""


class Capture(Protocol):
    """How work is made to be repeated.

    Attributes:
        strict: whether a capture that fails ends the run; if not, it goes on without.
    """

    strict: bool

    def warm_up(self, work: Work) -> tuple[Tensor, ...]:
        """Do ``work``, as it will be captured; gives its results."""
        ...

    def capture(self, work: Work) -> Work:
        """A function that repeats ``work`` on the memory that it uses now; ``work`` is not done by this call."""
        ...


class CudaGraphs:
    """Capture by ``torch.cuda.graph``; all graphs share one pool of memory, as they never run at the same time.

    What a graph leaves in that pool (gradients, say) is gone when another one has run.
    """

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer, *, strict: bool) -> None:
        self.device, self.optimizer, self.strict = device, optimizer, strict
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, work: Work) -> tuple[Tensor, ...]:
        now = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            results = work()
        now.wait_stream(self._stream)
        return results

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(self.device)
        self._capturable(True)
        try:
            with (
                torch.cuda.device(self.device),
                # In other threads calls are allowed that a capture must not hold: batches are being prefetched.
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                results = work()
        finally:
            # A capture that failed leaves its stream the current one.
            torch.cuda.set_stream(now)
            self._capturable(False)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            # The next replay writes to the same place.
            return tuple(result.clone() for result in results)

        return replay

    def _capturable(self, value: bool) -> None:
        # The fused kernel is the same either way; the optimiser insists on it in a capture and warns of it elsewhere.
        for group in self.optimizer.param_groups:
            group["capturable"] = value


@dataclasses.dataclass(slots=True)
class _Shape:
    """What belongs to one shape of drafts: the memory that its graph reads, and the graph once there is one."""

    inputs: Draft
    met: bool = False
    replay: Work | None = None


class StepGraphs:
    """Steps that are captured when their shape is met for the second time.

    The first step of a shape runs without a graph: it loads and tunes what a capture cannot, and counts as any other.

    Args:
        step: does everything from a draft to the update of the weights (of several processes, to this one's gradient),
            on the device alone, and gives a few numbers.
        capture: how.
        rows: the most frames that a draft can bring (``BodyBatches.most_rows``).
        limit: graphs that are kept; beyond it the one that was used longest ago goes.
        say: told why steps go on without graphs, where a capture failed that was not strict.

    Raises:
        UserError: a capture that is strict failed.
    """

    def __init__(
        self,
        step: Callable[[Draft], tuple[Tensor, ...]],
        capture: Capture,
        *,
        rows: int,
        limit: int = LIMIT,
        say: Callable[[str], None] = print,
    ) -> None:
        self.step, self.rows, self.limit, self.say = step, rows, limit, say
        self._capture: Capture | None = capture
        self._shapes: OrderedDict[tuple[int, int], _Shape] = OrderedDict()
        self._tables: dict[str, Tensor] = {}

    def __call__(self, draft: Draft) -> tuple[Tensor, ...]:
        """The results of ``step(draft)``."""
        if self._capture is None:
            return self.step(draft)
        if draft.shape not in self._shapes:
            if len(self._shapes) == self.limit:
                self._shapes.popitem(last=False)
            self._shapes[draft.shape] = _Shape(self._inputs(draft))
        shape = self._shapes[draft.shape]
        self._shapes.move_to_end(draft.shape)
        draft.copy_into(shape.inputs)

        def work() -> tuple[Tensor, ...]:
            return self.step(shape.inputs)

        if not shape.met:
            shape.met = True
            return self._capture.warm_up(work)
        if shape.replay is None:
            try:
                shape.replay = self._capture.capture(work)
            except RuntimeError as error:
                line = str(error).strip().partition("\n")[0]
                if self._capture.strict:
                    raise SharedError(f"the step cannot be captured as a CUDA graph ({line}): set graph off") from error
                self.say(f"steps run without CUDA graphs: {line}")
                self._capture = None
                self._shapes.clear()
                return self.step(draft)
        return shape.replay()

    def _inputs(self, draft: Draft) -> Draft:
        def table(name: str) -> Tensor | None:
            source = getattr(draft, name)
            if source is None:
                return None
            if name not in self._tables:
                self._tables[name] = source.new_zeros(self.rows, *source.shape[1:])
            return self._tables[name]

        return dataclasses.replace(
            draft,
            numbers=torch.empty_like(draft.numbers),
            frames=table("frames"),
            seen=table("seen"),
            # The host's own: they are those of one draft, and no graph may depend on them.
            index=None,
            bodies=None,
        )


def draws(model: nn.Module) -> bool:
    """Whether ``model`` draws from torch's generators in training, which the host seeds anew in each step."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or (isinstance(module, DropPath) and module.rate > 0)
        for module in model.modules()
    )


def wanted(
    setting: Literal["auto", "on", "off"], device: torch.device, accumulate: int, shard: Literal["none", "full"]
) -> bool:
    """Whether steps are captured: ``auto`` says so wherever they can be.

    Raises:
        UserError: ``on`` where they cannot; says why.
    """
    reason = None
    if device.type != "cuda":
        reason = f"CUDA graphs need a GPU, the device is {device}"
    elif distributed.size() > 1 and shard == "full":
        reason = "shard is full, and shards come together in the middle of a step"
    elif accumulate > 1:
        reason = f"optim.accumulate is {accumulate}, and the parts of a batch differ in shape"
    if setting == "on" and reason is not None:
        raise SharedError(f"graph is on, but {reason}: expected auto or off")
    return setting != "off" and reason is None
