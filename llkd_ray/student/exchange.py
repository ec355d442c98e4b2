"""Average gradients over workers on CPUs, without sending zeros.

Half of a small encoder's weights are its vocabulary. A step's texts touch a hundredth of it, and
the gradient of the other rows is zero on every worker. DeepSpeed sends it all, from a copy and back
into one; even alone, a worker copies twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class GradientMean:
    """Stands for DeepSpeed's exchange of whole gradients: same mean, fewer bytes and copies.

    For whole float32 gradients on the CPU. Every worker must call it at the same time.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        embeddings = {id(module.weight) for module in modules}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sparse = [parameter for parameter in trained if id(parameter) in embeddings]
        self._dense = [parameter for parameter in trained if id(parameter) not in embeddings]
        # Kept from step to step: fresh memory of this size costs as much as copying into it.
        self._sums = torch.empty(sum(map(torch.Tensor.numel, self._dense)))

    def __call__(self, *_: Any, **__: Any) -> None:
        """Put the mean over the workers into every parameter's `grad`."""
        for parameter in (*self._sparse, *self._dense):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if dist.get_world_size() > 1:
            self._average_touched(_gradients(self._sparse))
            torch.cat([gradient.flatten() for gradient in _gradients(self._dense)], out=self._sums)
            _average(self._sums)
            parts = torch.split(self._sums, [parameter.numel() for parameter in self._dense])
            for parameter, part in zip(self._dense, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def _average_touched(self, gradients: Sequence[torch.Tensor]) -> None:
        """Average the rows that are not zero on some worker."""
        if not gradients:
            return
        # numpy's `any` is several times as fast as torch's, and like it takes NaN for true.
        touched = torch.cat([torch.from_numpy(of.numpy().any(axis=1)) for of in gradients]).byte()
        dist.all_reduce(touched, dist.ReduceOp.MAX)
        rows = [
            mask.nonzero()[:, 0] for mask in torch.split(touched, [len(of) for of in gradients])
        ]
        packed = torch.cat([of[at].flatten() for of, at in zip(gradients, rows, strict=True)])
        _average(packed)
        sizes = [len(at) * of.shape[1] for of, at in zip(gradients, rows, strict=True)]
        for of, at, part in zip(gradients, rows, torch.split(packed, sizes), strict=True):
            of[at] = part.view(len(at), -1)


def _gradients(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _average(values: torch.Tensor) -> None:
    # Gloo sums two halves at once in three quarters of the time of the whole.
    sums = [dist.all_reduce(half, async_op=True) for half in values.chunk(2)]
    for under_way in sums:
        under_way.wait()
    values /= dist.get_world_size()
