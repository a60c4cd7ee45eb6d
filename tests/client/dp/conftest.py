"""The plain oracle of the clipped sum: one patient after another by ordinary autograd."""

import math
from types import SimpleNamespace

import pytest
import torch

from fedscan_client.dp import plans
from fedscan_client.dp.bookkeeping import size_class
from fedscan_client.dp.engine import MARGIN, clipped_sum
from fedscan_models import tasks


@pytest.fixture(scope="session")
def oracle():
    return SimpleNamespace(reference=reference, error=error, holds=holds, rows=rows, planned=planned)


def reference(module, x_B, y_B, sizes, clip):
    """(clipped sum, norms): one patient after another by plain autograd in the module's own type."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    total, norms, first = [torch.zeros_like(p) for p in parameters], [], 0
    for size in sizes:
        if size:
            loss = tasks.loss_rows(module(x_B[first : first + size]), y_B[first : first + size]).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            bound = (1 - MARGIN) * (1.0 if clip == "auto" else clip)
            factor = bound / (norm + 0.01) if clip == "auto" else min(1.0, bound / norm)
            for so_far, gradient in zip(total, gradients, strict=True):
                so_far += factor * gradient
            norms.append(norm)
        first += size
    return total, norms


def error(found, expected):
    off = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return math.sqrt(off / sum(float(b.square().sum()) for b in expected))


def holds(module, x_B, y_B, sizes):
    """Flat clipping where some are clipped and some are not, and automatic clipping."""
    _, norms = reference(module, x_B, y_B, sizes, 1.0)
    for clip in (sorted(norms)[len(norms) // 2] * 1.0001, "auto"):
        expected, _ = reference(module, x_B, y_B, sizes, clip)
        found = clipped_sum(module, tasks.loss_rows, x_B, y_B, sizes, clip=clip)
        assert error(found, expected) <= 1e-12


def rows(shape, count, *, kind=torch.float64):
    generator = torch.Generator().manual_seed(count)
    x_B = torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(kind)
    return x_B, torch.randint(0, 2, (count,), generator=generator)


def planned(module, x_B, y_B, sizes):
    """No size fell back to the plain loop."""
    classes = {size_class(size) for size in sizes if size}
    return all(plans.plan_for(module, tasks.loss_rows, x_B, y_B, size) is not None for size in classes)
