"""What runs a unit's forward only to look at it, or inside of a transform: parameters cannot be exchanged there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NoReturn

import torch

from ..errors import AliasError, OffloadError
from .compiling import uncompiled
from .overrides import Override

if TYPE_CHECKING:
    from .units import StagedUnit

__all__ = ["ScriptRefusal", "refuse_lost_writes", "refuse_tracing", "said_of"]

_KEYS: Final = torch._C._TorchDispatchModeKey
_MODES: Final = {
    _KEYS.FAKE: "on fake tensors (FakeTensorMode)",
    _KEYS.PROXY: "by make_fx",
    _KEYS.FUNCTIONAL: "inside of a functionalisation",
}
_APART: Final = (
    "Keep that unit on the device (pattern_policy), compile it not (torch.compiler.disable), or register what is "
    "written as a tensor of its own (clone())"
)


def refuse_tracing(unit: str) -> None:
    """Raise OffloadError where a unit is entered by something that would see its slot, and not its weights."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise OffloadError(
            f'unit "{unit}" was called inside of a torch.func transform (grad, vmap, jvp), under which '
            "parameters cannot be exchanged; use torch.autograd, or restore_() the module first"
        )
    how = "by torch.jit.trace" if torch._C._is_tracing() else None
    if how is None and torch._C._len_torch_dispatch_stack():
        how = next((said for key, said in _MODES.items() if torch._C._get_dispatch_mode(key) is not None), None)
    if how is not None:
        raise OffloadError(
            f'unit "{unit}" was called {how}, which would record a slot in the place of its weights; restore_() the '
            "module first, or trace the model before it is offloaded"
        )


@uncompiled
def refuse_lost_writes(unit: StagedUnit, *, mapped: bool) -> None:
    """Raise AliasError where a compiled forward wrote tensors that share bytes.

    It writes the tensor of which torch knows them to be views, which is not what is in the slot. Where it ran over the
    mapped bytes, it took them for two.
    """
    if not any(staged.was_written() for staged in unit.overlapping):
        return
    views = [staged.member.name for staged in unit.overlapping if mapped or staged.tensor._base is not None]
    if views:
        raise AliasError(
            f'"{views[0]}" shares its bytes with others, and one of them was written inside of what torch.compile made '
            f'of unit "{unit.name}": that write is lost. {_APART}'
        )


class ScriptRefusal(Override):
    """The `__prepare_scriptable__` of an offloaded module."""

    def __call__(self) -> NoReturn:
        raise OffloadError(
            "an offloaded module cannot be scripted: compiled code holds its tensors itself, so that none can be "
            "exchanged; use torch.compile, or restore_() the module first"
        )


def said_of(unit: StagedUnit, error: RuntimeError) -> RuntimeError | OffloadError:
    """What a unit's forward raised; as OffloadError where it is our doing, and the user has a remedy."""
    return _said_of_views(unit, error) or _said_of_hooks(unit.name, error)


def _said_of_views(unit: StagedUnit, error: RuntimeError) -> OffloadError | None:
    """On a GPU torch does not even compile what would be a lost write: it takes it for one to the base, on the host."""
    if not unit.overlapping or "torch._dynamo" not in sys.modules:
        return None
    from torch._dynamo.exc import BackendCompilerFailed

    views = [staged.member.name for staged in unit.overlapping if staged.tensor._base is not None]
    if not views or not isinstance(error, BackendCompilerFailed):
        return None
    return AliasError(
        f'"{views[0]}" shares its bytes with others as views of one tensor, which is not in the slot of unit '
        f'"{unit.name}", and torch.compile failed there: a write to them is lost. {_APART}'
    )


def _said_of_hooks(unit: str, error: RuntimeError) -> RuntimeError | OffloadError:
    """That nobody may look at what autograd saves."""
    disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if "saved tensor hooks" not in str(error) and (disabled is None or str(error) != disabled):
        return error
    return OffloadError(
        f'unit "{unit}" is staged, so that what autograd saves of it must be hooked, which torch refuses here: {error} '
        "Call it under torch.no_grad(), or map that unit or keep it on the device by a pattern_policy"
    )
