"""What may come in: a model that fits the network this site built itself, and nothing else. Never code."""

import numpy as np
import torch
from torch import nn

from fedscan_core.errors import WireError
from fedscan_core.wire import Arrays


def load_model(module: nn.Module, model: Arrays | None) -> None:
    """Loads the server's arrays into the module after checking names, shapes, types and finiteness.

    Raises:
        WireError: anything that does not fit exactly.
    """
    own = module.state_dict()
    if model is None or set(model) != set(own):
        raise WireError("The server's model has other parameters than this site's network.")
    for name, array in model.items():
        wanted = own[name]
        if array.shape != tuple(wanted.shape) or array.dtype != wanted.numpy().dtype:
            raise WireError(f"Parameter '{name}' of the server's model has another shape or type.")
        if not np.isfinite(array).all():
            raise WireError(f"Parameter '{name}' of the server's model is not finite.")
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in model.items()})
