"""An optimizer around another one: what acts just before and just after the step of any `torch.optim.Optimizer`.

Unlike hooks, a wrapper knows the learning rate and the groups, takes part in `state_dict` and in closures. Groups and
state are the inner optimizer's own objects, so schedulers, gradient scalers and clipping see one optimizer. A step that
a gradient scaler skips never reaches it, and neither do the parts of an accumulated batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Base class. group_defaults: keys that every group gets unless it has them.

    What a subclass keeps for a parameter is in `own[parameter]`, tensors by the names in `own_keys`; they are stored in
    their own precision beside the inner optimizer's state. The checkpoint of a bare inner optimizer loads, too.
    """

    own_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, inner: Optimizer, group_defaults: Mapping[str, Any]) -> None:
        # Not Optimizer.__init__, which makes groups and a state of its own; this sets up its hooks and profiling.
        super().__setstate__({"inner": inner, "defaults": {**inner.defaults, **group_defaults}})
        self.inner = inner
        self.group_defaults = dict(group_defaults)
        self.own: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._complete_groups()

    @classmethod
    def around(cls, inner: Optimizer, model: nn.Module, **options: Any) -> OptimizerWrapper:
        """As a recipe makes it; wrappers that look at the model override this."""
        return cls(inner, **options)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the order that checkpoints count them."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)
        self._complete_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        whole = self.inner.state_dict()
        state = {index: dict(entries) for index, entries in whole["state"].items()}
        for index, parameter in enumerate(self.parameters()):
            if parameter in self.own:
                state[index] = {**state.get(index, {}), **self.own[parameter]}
        return {**whole, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        state: dict[int, dict[str, Any]] = {}
        own: dict[int, dict[str, Tensor]] = {}
        for index, entries in state_dict["state"].items():
            for key, value in entries.items():
                (own if key in self.own_keys else state).setdefault(index, {})[key] = value
        self.inner.load_state_dict({**state_dict, "state": state})
        self._complete_groups()
        parameters = self.parameters()
        self.own = {
            parameters[index]: {key: value.to(parameters[index].device, copy=True) for key, value in entries.items()}
            for index, entries in own.items()
        }

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for key, value in self.group_defaults.items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # schedulers patch step

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"
