"""The blocks of `resnet.py` as a space's: `architecture.yaml` names this one.

A block's inner width is a choice here, in quarters of its outer one; the rest is as in the network,
so that a supernet may begin with its weights (`architecture.initial`).
"""

from resnet import Subsample
from torch import Tensor, nn
from torch.nn import functional

from optimizer.architecture.plan import LayerPlan

_QUARTERS = 4


def residual(plan: LayerPlan, n_in: int) -> nn.Module:
    """`expansion` counts quarters; `shortcut` has to be off, as the block has its own."""
    if plan.shortcut:
        raise ValueError("shortcuts: got true, want [false]: the block has its own")
    inner = plan.width * plan.expansion // _QUARTERS
    return _Residual(n_in, inner, plan.width, plan.stride)


class _Residual(nn.Module):
    def __init__(self, n_in: int, inner: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        is_same = stride == 1 and n_in == n_out
        self.shortcut = nn.Identity() if is_same else Subsample(n_out - n_in, stride)

    def forward(self, features: Tensor) -> Tensor:
        inside = functional.relu(self.bn1(self.conv1(features)))
        return functional.relu(self.bn2(self.conv2(inside)) + self.shortcut(features))
