"""What every task needs and takes seconds to import: loaded once, in the process that tasks are forked from.

Nothing here computes or touches CUDA: what has started threads or a device cannot be forked.
"""

import flwr.supernode.runtime.run_clientapp  # noqa: F401
import torch._dynamo  # noqa: F401  what torch's autograd functions import at their first use
from PIL import Image

import fedscan_client.app
import fedscan_client.node.task  # noqa: F401
import fedscan_client.node.worker
import fedscan_models.registry  # noqa: F401

Image.preinit()
