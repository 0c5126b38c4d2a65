"""What stands for CUDA graphs where there is no GPU.

It notes the operators of a step with the tensors they work on and does them again, so what is not in that memory when
they run again is as stale as in a graph.
"""

import math
import traceback
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from jmm_fast.train import graph
from jmm_fast.train.pretrain import pretrain

# Give the host a number of the device, or a shape that depends on one.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
# The checks of values that ops make on CPU tensors alone.
CHECKS_ON_CPU = ("ops/motion_loss.py", "ops/clip_window.py", "ops/topology_attention.py")


def storages(values):
    return {x.untyped_storage().data_ptr() for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)}


class Operators(TorchDispatchMode):
    """Notes the operators that run: function, arguments, and what they made that is no view of an argument."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func.namespace != "c10d", f"{func} talks to other processes"
        if func.overloadpacket.__name__ in WAITS:
            places = [frame.filename for frame in traceback.extract_stack()]
            assert any(place.endswith(CHECKS_ON_CPU) for place in places), f"{func} waits for the device"
        out = func(*args, **kwargs)
        given = storages((args, kwargs))
        results = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        fresh = [None if x.untyped_storage().data_ptr() in given else x.detach() for x in results]
        self.calls.append((func, args, kwargs, fresh))
        return out


class Recorder:
    """A capture whose replays do the operators of the step again."""

    strict = True
    made: ClassVar[list["Recorder"]] = []

    def __init__(self, device, optimizer, *, strict=True):
        self.optimizer = optimizer
        self.captures, self.replays, self.warm_ups = 0, 0, 0
        Recorder.made.append(self)

    def state(self):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return parameters + [x for p in parameters for x in self.optimizer.state[p].values()]

    def warm_up(self, work):
        self.warm_ups += 1
        return work()

    def capture(self, work):
        self.captures += 1
        state = self.state()
        before = [x.detach().clone() for x in state]
        with Operators() as operators:
            results = work()
        with torch.no_grad():
            # A capture computes nothing.
            for x, old in zip(state, before, strict=True):
                x.copy_(old)

        @torch.no_grad()
        def replay():
            self.replays += 1
            fresh = [x for *_, made in operators.calls for x in made if x is not None]
            for x in fresh:
                # Another graph has worked in this memory.
                x.fill_(math.nan if x.is_floating_point() else 0 if x.dtype == torch.bool else -(2**40))
            for func, args, kwargs, made in operators.calls:
                again = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
                for x, new in zip(made, again, strict=True):
                    if x is not None:
                        x.copy_(new)
            return tuple(x.clone() for x in results)

        return replay


def pretrain_captured(config, data, out):
    """In a process of several: a run by captured steps."""
    graph.wanted, graph.CudaGraphs = lambda *_: True, Recorder
    pretrain(config, data=data, out=out, say=lambda _: None)
    (made,) = Recorder.made
    assert made.replays >= 4, made.replays
