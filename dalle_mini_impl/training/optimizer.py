"""AdamW and Muon: which weights each one trains, and how their state comes back."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import has_fast_bf16
from dalle_mini_impl.training.muon import Muon

MIN_HIDDEN_CHANNELS = 16


def build_optimizers(
    model: nn.Module,
    *,
    kind: Literal["adamw", "muon"],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> list[Optimizer]:
    """Build AdamW for all weights, or Muon for the hidden matrices and AdamW for the rest.

    AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. Muon: Jordan et al. 2024, with the update
    scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate
    serves both. Only matrices decay. Each group holds its base rate as ``initial_lr``.
    """
    # id of each weight matrix -> whether it is a hidden one. Muon is for these only: output heads,
    # like token tables, stay with AdamW (Jordan et al.).
    matrix_ids = {
        id(module.weight): not name.endswith("head")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    # Tied weights appear once in model.parameters(), and so in one group.
    hidden, matrices, vectors = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in matrix_ids:
            vectors.append(parameter)  # biases, norm scales, token tables: no decay
        elif kind == "muon" and matrix_ids[id(parameter)] and _is_hidden(parameter):
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=True
    )
    optimizers: list[Optimizer] = [adamw]
    if hidden:
        # Newton-Schulz needs few bits; float32 is for hardware that only emulates bf16.
        dtype = torch.bfloat16 if has_fast_bf16() else torch.float32
        muon = Muon(hidden, lr=learning_rate, weight_decay=weight_decay, dtype=dtype)
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = learning_rate
    return optimizers


def _is_hidden(weight: nn.Parameter) -> bool:
    """Tell whether both sides of a weight are features, not pixels or codes."""
    # Of a convolution only the sizes tell: the first ones read colors, the last write codes.
    return weight.ndim == 2 or min(weight.shape[:2]) >= MIN_HIDDEN_CHANNELS


def flatten_optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state of any torch optimizer into tensors by name and a rest that JSON can hold.

    A name is for example `state.0.exp_avg`; the tensors are no copies.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(optimizer.state_dict(), "", tensors)


def restore_optimizer_state(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Undo `flatten_optimizer_state`, but keep this optimizer's options; the tensors are copied.

    The optimizer is a new one over the same parameters in the same order.

    Raises:
        UserError: The state does not belong to these parameters, or a part of it is missing.
    """
    # torch restores options too, but a resumed run may have another learning rate.
    options = [dict(group) for group in optimizer.param_groups]
    try:
        saved = _decode(meta, tensors)
        optimizer.load_state_dict(saved)
        saved_keys = [key for group in saved["param_groups"] for key in group["params"]]
        _check_shapes(optimizer)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"optimizer state: does not fit this optimizer: {error}") from error
    for group, own_options in zip(optimizer.param_groups, options, strict=True):
        group.update(own_options)
    # torch casts state to the dtype of its parameter; here it keeps the dtype it was saved in.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, parameter in zip(saved_keys, parameters, strict=True):
        if key in saved["state"]:
            optimizer.state[parameter] = _uncast(optimizer.state[parameter], saved["state"][key])
    _keep_memory_formats(optimizer)


def _check_shapes(optimizer: Optimizer) -> None:
    # torch checks none: AdamW, Muon and SGD keep scalars, and tensors of the parameter's shape.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape not in {parameter.shape, torch.Size()}:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
                )


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Make a tree JSON-able: tensors move out; tuples and dicts with int keys get a tag."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"__tensor__": name}
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _encode(item, prefix + key, tensors) for key, item in value.items()}
        # JSON turns integer keys (of parameters) into strings, so such dicts become lists of pairs.
        items = [[key, _encode(item, f"{prefix}{key}", tensors)] for key, item in value.items()]
        return {"__items__": items}
    if isinstance(value, (list, tuple)):
        parts = [_encode(item, f"{prefix}{index}", tensors) for index, item in enumerate(value)]
        return {"__tuple__": parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name}: got a {type(value).__name__}, expected tensors and JSON values")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]].clone()
    if "__items__" in value:
        return {key: _decode(item, tensors) for key, item in value["__items__"]}
    if "__tuple__" in value:
        return tuple(_decode(item, tensors) for item in value["__tuple__"])
    return {key: _decode(item, tensors) for key, item in value.items()}


def _uncast(loaded: Any, saved: Any) -> Any:
    """Move saved values to the devices of the loaded ones (AdamW may keep `step` on the CPU)."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device)
    if isinstance(saved, Mapping):
        return {key: _uncast(loaded[key], item) for key, item in saved.items()}
    if isinstance(saved, (list, tuple)):
        return type(saved)(_uncast(old, new) for old, new in zip(loaded, saved, strict=True))
    return saved


def _keep_memory_formats(optimizer: Optimizer) -> None:
    # Fused AdamW on a CPU walks through parameter and moments side by side in memory, whatever
    # their strides. Moments read from a file must be laid out like the parameter, for example
    # channels-last, or the wrong elements are paired without an error.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
