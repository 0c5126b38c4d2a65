"""How much memory a step keeps from its forward for its backward pass."""

import dataclasses
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.utils._pytree import tree_leaves

from jmm_fast.train import sharding


def kept_bytes(loss: Tensor, apart: Iterable[Tensor]) -> int:
    """Bytes of all memory that the graph of ``loss`` keeps for its backward pass, each piece counted once.

    The graph is walked, nothing is computed: what operators have saved, and what autograd functions keep as attributes
    of their context. What a function written in C++ saves is not seen; this project has none.

    Args:
        loss: before its backward pass.
        apart: tensors whose memory is not counted, as they are there without it: weights and the batch.
    """
    met = {_storage(value) for value in apart}
    total = 0
    nodes, found = [loss.grad_fn], {loss.grad_fn}
    while nodes:
        node = nodes.pop()
        for value in _kept(node):
            storage = _storage(value)
            if storage not in met:
                met.add(storage)
                total += value.untyped_storage().nbytes()
        after = {following for following, _ in node.next_functions if following is not None} - found
        found |= after
        nodes.extend(after)
    return total


def tensors_of(batch) -> list[Tensor]:
    """The tensors that are fields of ``batch``."""
    fields = dataclasses.fields(batch) if dataclasses.is_dataclass(batch) else ()
    values = [getattr(batch, field.name) for field in fields] or vars(batch).values()
    return [value for value in values if isinstance(value, Tensor)]


def _kept(node) -> Iterator[Tensor]:
    # Of an operator, by torch's convention; then of a function in Python.
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    values += [getattr(node, "saved_tensors", ()), getattr(node, "__dict__", {})]
    return (sharding.local(value) for value in tree_leaves(values) if isinstance(value, Tensor))


def _storage(value: Tensor) -> int:
    return sharding.local(value).untyped_storage()._cdata
