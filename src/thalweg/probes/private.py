"""private: a copy of an objective's module that is moved from point to point by writing into its parameters.

`Objective.apply` swaps parameters for every call, which for a small net takes as long as the net.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from thalweg.objective import Objective
from thalweg.precision import copied


class Private:
    """A module whose parameters are stretches of one vector.

    Args:
        objective: the landscape; its module is copied.
    """

    def __init__(self, objective: Objective) -> None:
        self.module = copied(objective.module, device=objective.device, dtype=objective.dtype)
        self.space = objective.space
        self._theta = objective.theta()
        views = self.space.parameters(self._theta)
        for name, parameter in self.module.named_parameters():
            if name in views:
                parameter.data = views[name]
        self._buffers = dict(self.module.named_buffers())
        self._kept = {name: buffer.clone() for name, buffer in self._buffers.items()}
        self._parts = list(self.module.modules())

    def apply(self, theta: Float[Tensor, " params"], inputs: Any) -> Any:
        """Run the module at theta; what it changes in itself is put back, as in `Objective.apply`."""
        self._theta.copy_(theta)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        before = [(vars(m), vars(m).copy(), m._buffers.copy()) for m in self._parts]
        try:
            return self.module(*(args if isinstance(args, tuple) else (args,)), **kwargs)
        finally:
            for attributes, kept, buffers in before:
                for name in attributes.keys() - kept.keys():
                    del attributes[name]
                attributes.update(kept)
                attributes["_buffers"].update(buffers)
            for name, buffer in self._buffers.items():
                buffer.copy_(self._kept[name])
