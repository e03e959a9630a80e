"""A training run as a file: model, optimizers, loss scale, random numbers and what the user adds.

On several ranks (DistributedDataParallel, fully_shard, tensor parallel) every rank calls: sharded tensors are
gathered, the first rank writes one file, and each takes its part of it when it resumes. The number of ranks
may be another then; random numbers go on where a rank of that number was there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.errors import CheckpointError
from halfstep.switching.checkpoint_files import read_file, write_file
from halfstep.switching.naming import parameter_names
from halfstep.switching.ranks import Ranks, sharded_like, whole

__all__ = ["Checkpointed", "Resumed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What a checkpoint held besides what was put in its place, and what did not match."""

    more: dict[str, Any]
    """What was saved under a keyword and has no object to go into, such as ``epoch``."""
    missing: tuple[str, ...]
    """What the run has and the checkpoint has not: it is as it was."""
    unexpected: tuple[str, ...]
    """What the checkpoint has and the run has not: it was left out."""


class Checkpointed(Protocol):
    """A switch as its checkpoints see it, and the two methods that it gets from here."""

    model: nn.Module

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those that step the model's parameters."""
        ...

    def ranks(self) -> Ranks:
        """The processes that train the model together."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The loss scale and what belongs to it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...

    def save(self, path: str | os.PathLike[str], **more: Any) -> None:
        """Write the run to a file: model, optimizers, loss scale, random numbers, and ``more``.

        The file is there whole or not at all, whenever the process is killed. ``more`` is what the loop needs
        besides: tensors, numbers, text, lists and dicts of them; of an object with ``state_dict()`` (a
        scheduler, an averaged model) that. Call it between steps; on several ranks, on all of them: sharded
        tensors are gathered and the first rank writes.

        Raises:
            CheckpointError: something in it is no plain data, or another process is writing the file.
            OSError: the folder cannot be written to; what was there before is as it was.

        >>> import halfstep, tempfile, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> s = halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe="fp16")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     s.save(f"{folder}/run.pt", epoch=3)
        ...     s.resume(f"{folder}/run.pt").more
        {'epoch': 3}
        """
        _save(self, Path(path), more)

    def resume(
        self, path: str | os.PathLike[str], *, partial: bool = False, **into: Any
    ) -> Resumed:
        """Go on from a file of `save`, bit for bit; what is in ``into`` (a scheduler) is given its state.

        Returns what else was saved, as ``.more``. With ``partial`` what one side lacks is left out and listed
        in ``.missing`` and ``.unexpected``, for a model that has changed since.

        Raises:
            CheckpointError: the file is damaged, no checkpoint, of a newer version, or does not fit: shapes
                differ, or names and not ``partial``. Nothing was changed.
            SwitchError: it is of another recipe. Nothing was changed.
        """
        return _load(self, Path(path), partial, into)


def _save(run: Checkpointed, path: Path, more: Mapping[str, Any]) -> None:
    """Write ``run`` and ``more`` to ``path``, whole or not at all (see `write_file`)."""
    ranks = run.ranks()
    model = _unwrapped(run.model)
    content = {
        "model": _whole(model.state_dict()),
        "optimizers": [_optimizer_state(o, model, ranks) for o in run.optimizers],
        "switch": _whole(run.state_dict()),
        "random": ranks.gathered(_random_state()),
        "more": {name: _state_of(value) for name, value in more.items()},
    }
    failure: Exception | None = None
    if ranks.is_first:
        try:
            write_file(path, content)
        except Exception as error:
            failure = error
    # Nobody goes on before the file is there, and nobody believes in one that is not.
    failed = ranks.first_with([failure is not None])[0]
    if failure is not None:
        raise failure
    if failed is not None:
        raise CheckpointError(f"rank {failed} could not write {path}; its own error says why")


def _load(run: Checkpointed, path: Path, partial: bool, into: Mapping[str, Any]) -> Resumed:
    """Put what `_save` wrote in its place; everything is looked at before anything is changed."""
    content = read_file(path)
    model = _unwrapped(run.model)
    now = model.state_dict()
    saved = content["model"]
    _check_shapes(path, now, saved)
    missing = [f"model {k}" for k in now if k not in saved]
    unexpected = [f"model {k}" for k in saved if k not in now]
    states = content["optimizers"]
    if len(states) != len(run.optimizers):
        raise CheckpointError(
            f"{path} holds {len(states)} optimizers, the switch has {len(run.optimizers)}. Give "
            "halfstep.switch the optimizers that were saved"
        )
    wanted = []
    for k, (optimizer, state) in enumerate(zip(run.optimizers, states, strict=True)):
        _check_groups(path, k, optimizer, state, partial)
        fitted, lacks, extra = _fitted(optimizer, state, model)
        wanted.append(fitted)
        missing += [f"optimizer {k} {name}" for name in lacks]
        unexpected += [f"optimizer {k} {name}" for name in extra]
    more = dict(content["more"])
    missing += [name for name in into if name not in more]
    if (missing or unexpected) and not partial:
        raise CheckpointError(
            f"{path} does not fit: {_listed('missing', missing)}{_listed('unexpected', unexpected)}"
            "resume(path, partial=True) takes what fits and reports the rest"
        )
    run.load_state_dict(content["switch"])
    model.load_state_dict(
        {k: _like(v, now[k]) for k, v in saved.items() if k in now}, strict=not partial
    )
    for optimizer, state in zip(run.optimizers, wanted, strict=True):
        optimizer.load_state_dict(state)
    for name, target in into.items():
        if name in more:
            target.load_state_dict(more.pop(name))
    _set_random_state(content["random"], run.ranks())
    return Resumed(more=more, missing=tuple(missing), unexpected=tuple(unexpected))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model, so that its keys are the same on one process and on many, compiled or not."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _whole(value: Any) -> Any:
    """Sharded tensors in one piece; all ranks."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, dict):
        kept = type(value)({k: _whole(v) for k, v in value.items()})
        if hasattr(value, "_metadata"):
            setattr(kept, "_metadata", getattr(value, "_metadata"))  # noqa: B009, B010
        return kept
    return value


def _like(value: Any, target: Any) -> Any:
    both = isinstance(value, Tensor) and isinstance(target, Tensor)
    return sharded_like(value, target) if both else value


def _state_of(value: Any) -> Any:
    """The state of an object that has one (a scheduler, another model), or the value itself."""
    return _whole(value.state_dict() if hasattr(value, "state_dict") else value)


# -- optimizers: the state of each parameter by its name, for a model that has others beside it ----------


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """A name for each parameter, in the order of the optimizer's state."""
    known = parameter_names(model)
    return [
        known.get(id(p), f"parameter {k} of group {g}")
        for g, group in enumerate(optimizer.param_groups)
        for k, p in enumerate(group["params"])
    ]


def _optimizer_state(optimizer: Optimizer, model: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """``state_dict()``, and its names. All ranks; empty on those that hold a part (ZeRO) and do not write."""
    consolidate = getattr(optimizer, "consolidate_state_dict", None)
    if consolidate is not None:
        consolidate(to=0)
        if not ranks.is_first:
            return {}
    state = optimizer.state_dict()
    return {
        "kind": type(optimizer).__name__,
        "names": _names(optimizer, model),
        "param_groups": state["param_groups"],
        "state": {k: _whole(v) for k, v in state["state"].items()},
    }


def _check_groups(
    path: Path, k: int, optimizer: Optimizer, state: dict[str, Any], partial: bool
) -> None:
    if state["kind"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{path}: optimizer {k} was a {state['kind']}, the switch has a {type(optimizer).__name__}"
        )
    then = [len(group["params"]) for group in state["param_groups"]]
    now = [len(group["params"]) for group in optimizer.param_groups]
    if len(then) != len(now) or (then != now and not partial):
        raise CheckpointError(
            f"{path}: optimizer {k} had groups of {then} parameters, the switch has {now}. Make the "
            "optimizer as it was when it was saved"
        )


def _fitted(
    optimizer: Optimizer, state: dict[str, Any], model: nn.Module
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The saved state in this optimizer's order; which parameters it lacks, and which are no longer there."""
    names = _names(optimizer, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    place = {name: k for k, name in enumerate(names)}
    held: dict[int, Any] = {}
    for k, of_one in state["state"].items():
        if isinstance(k, int) and k < len(state["names"]) and state["names"][k] in place:
            at = place[state["names"][k]]
            held[at] = _shaped_like(of_one, parameters[at])
    groups, first = [], 0
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        count = len(group["params"])
        groups.append({**saved, "params": list(range(first, first + count))})
        first += count
    saved_names = set(state["names"])
    lacks = [name for name in names if name not in saved_names]
    extra = [name for name in state["names"] if name not in place]
    return {"state": held, "param_groups": groups}, lacks, extra


def _shaped_like(of_one: Any, parameter: Tensor) -> Any:
    """State of the shape of a sharded parameter (moments), sharded as it is."""
    if not isinstance(of_one, dict):
        return of_one
    return {
        key: sharded_like(v, parameter)
        if isinstance(v, Tensor) and v.shape == parameter.shape
        else v
        for key, v in of_one.items()
    }


# -- what does not fit -----------------------------------------------------------------------------------


def _check_shapes(path: Path, now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    wrong = [
        f"{k} is {tuple(v.shape)} in the checkpoint and {tuple(now[k].shape)} in the model"
        for k, v in saved.items()
        if isinstance(v, Tensor) and isinstance(now.get(k), Tensor) and v.shape != now[k].shape
    ]
    if wrong:
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(wrong)}")


def _listed(what: str, names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what} {', '.join(names[:5])}{more}. " if names else ""


# -- random numbers --------------------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    """The state of the generators of Python, numpy, torch and each CUDA device, as plain data."""
    kind, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "python": (version, torch.tensor(numbers, dtype=torch.int64), gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_random_state(states: dict[int, Any], ranks: Ranks) -> None:
    """Go on with the random numbers of this rank; a rank that was not there keeps its own."""
    rank = torch.distributed.get_rank() if ranks else 0
    state = states.get(rank)
    if state is None:
        return
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(of_device, device)
