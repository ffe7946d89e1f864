"""Plain bfloat16 weights in the layout that a processor multiplies by quickest.

Law of this room: the numbers are those of the sealed model; only their order in memory is another. A product of
few tokens takes about half the time, one of many no more. The plain weights are given up, and made again for those
few who look at them.
"""

from __future__ import annotations

import torch
from torch import nn

_TOKENS = 64
"""The number of tokens that the layout is chosen for; it serves all others as well."""


class Weights:
    """One matrix in its own layout. What made it is not kept."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.size = weight.shape
        self.nbytes = weight.nbytes
        self.bias = bias
        self._held = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TOKENS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._held, self.bias, "none", [], "")

    def onto(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """`there` and the product, in one go."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, there, self._held, self.bias, "add")

    def opened(self, x: torch.Tensor) -> torch.Tensor:
        """Silu of the product, in one go."""
        return torch.ops.mkldnn._linear_pointwise(x, self._held, self.bias, "swish", [], "")

    def times(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """The product, each number of it times its own factor, in one go."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, factors, self._held, self.bias, "mul")

    def plain(self) -> torch.Tensor:
        """The weights as they were."""
        return self._held.to_dense()


class Reordered(nn.Module):
    """A linear module, or the part of one that several of them became."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.whole = Weights(weight.detach(), self.bias)
        self.begin = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights; of several that are one, the first tells."""
        return 0 if self.begin else self.whole.nbytes

    @property
    def dequantized(self) -> torch.Tensor:
        """The weights as they count."""
        return self.whole.plain()[self.begin : self.begin + self.out_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.whole(x)
        return made if made.shape[-1] == self.out_features else made[..., self.begin : self.begin + self.out_features]


def join(modules: list[Reordered]) -> Weights:
    """Modules that read the same input, as one product; each becomes a part of it."""
    if len(modules) == 1 and modules[0].whole.size[0] == modules[0].out_features:
        return modules[0].whole
    weight = torch.cat([m.dequantized for m in modules])
    bias = None if modules[0].bias is None else torch.cat([m.bias for m in modules])
    whole, begin = Weights(weight, bias), 0
    for module in modules:
        module.whole, module.begin = whole, begin
        begin += module.out_features
    return whole


def reorder(model: nn.Module) -> None:
    """Reorders every linear module with weights of its own, in place."""
    embedding = model.get_input_embeddings().weight
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if type(module) is nn.Linear and module.weight is not embedding:
                setattr(owner, name, Reordered(module.weight.data, module.bias))


def pays(model: nn.Module) -> bool:
    """Whether a model's weights are of the kind that gains by it, and the library is there."""
    weight = model.get_input_embeddings().weight
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
