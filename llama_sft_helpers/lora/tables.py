"""Notebook 04: what LoRA adds to a model, what it leaves alone, and what its settings cost and bring.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) leaves a weight W of shape (d_out, d_in) frozen and
learns an update (alpha / r) * B @ A, with A of shape (r, d_in) and B of shape (d_out, r). B starts at 0.
The functions take the ``model`` that PEFT's ``get_peft_model`` returned, look at it and change nothing; where
they need an adapter, or values instead of the meta device, they raise ``ValueError`` if there are none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from llama_sft_helpers.core.batches import checked_inputs
from llama_sft_helpers.core.bnb import checksum, dequantize, frozen_tensors, is_quantized
from llama_sft_helpers.core.llama import Shape
from llama_sft_helpers.core.modes import evaluation_mode
from llama_sft_helpers.core.plots import COLOURS, MARKERS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from peft import PeftModel

    from llama_sft_helpers.core.llama import ModelConfig


class AdapterNotNoopError(AssertionError):
    """An adapter that has to change nothing changes the logits; the message says where and by how much."""


def plan_adapters(config: ModelConfig, r: int, target_modules: Collection[str]) -> pd.DataFrame:
    """Predict A, B and the trainable parameters from a ``LlamaConfig`` alone: r * (d_in + d_out) a linear.

    Returns:
        One row a projection (index): ``layers``, shape of ``A`` and ``B``, ``parameters_per_layer`` and
        ``parameters`` (all layers).

    Raises:
        ValueError: A rank below 1, or a target that a Llama decoder layer does not have.
    """
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r is {r!r}; expected a whole number of at least 1, such as 16.")
    shape = Shape.of(config)
    unknown = sorted(set(target_modules) - set(shape.linears))
    if unknown or not target_modules:
        raise ValueError(
            f"target_modules holds {unknown or 'nothing'}; expected some of {', '.join(shape.linears)}."
        )
    rows = [
        (name, shape.layers, (r, d_in), (d_out, r), r * (d_in + d_out), shape.layers * r * (d_in + d_out))
        for name, (d_in, d_out) in shape.linears.items()
        if name in target_modules
    ]
    columns = ["projection", "layers", "A", "B", "parameters_per_layer", "parameters"]
    return pd.DataFrame(rows, columns=columns).set_index("projection")


def summarize_adapters(model: torch.nn.Module) -> pd.DataFrame:
    """The active adapter (https://huggingface.co/docs/peft/package_reference/lora), one row a projection.

    Returns:
        Index ``projection``; shape of ``A`` and ``B``, ``r``, ``alpha``, ``scaling`` (alpha / r), ``dtype``,
        ``layers``, ``parameters`` (all layers) and ``largest_entry_of_b`` (absolute; 0 before training).
    """
    table = pd.DataFrame([_adapter_row(*found) for found in _lora_layers(model)])
    groups = table.groupby(["projection", "A", "B", "r", "alpha", "scaling", "dtype"], sort=False)
    summary = groups.agg(
        layers=("size", "count"), parameters=("size", "sum"), largest_entry_of_b=("largest_entry_of_b", "max")
    )
    return summary.reset_index().set_index("projection")


def summarize_gradients(model: torch.nn.Module) -> pd.DataFrame:
    """Which A and B the last backward pass reached; call it after ``backward`` and before ``zero_grad``.

    Returns:
        Two rows (index ``matrix``: A, B): ``matrices``, ``gradient_tensors`` (number that have a gradient, be
        it 0), ``nonzero_gradients`` (number whose gradient has an entry other than 0) and
        ``largest_gradient`` (absolute; NaN if one holds a NaN).
    """
    layers, rows = list(_lora_layers(model)), []
    for matrix in ("A", "B"):
        grads = [getattr(layer, f"lora_{matrix}")[adapter].weight.grad for _, layer, adapter in layers]
        largest = torch.tensor([grad.abs().max().item() for grad in grads if grad is not None])
        top = largest.max().item() if len(largest) else 0.0
        rows.append((matrix, len(grads), len(largest), int((largest > 0).sum()), top))
    columns = ["matrix", "matrices", "gradient_tensors", "nonzero_gradients", "largest_gradient"]
    return pd.DataFrame(rows, columns=columns).set_index("matrix")


def summarize_frozen(model: torch.nn.Module) -> pd.DataFrame:
    """A checksum of every tensor that is not trained, int8 scales included: equal tables, equal base model.

    Each checksum is computed where its tensor lies, so nothing is copied from a GPU. The index ``tensor`` is
    its name; the columns are ``dtype``, ``bytes`` and ``checksum``. Tied weights are one tensor.
    """
    if not (frozen := frozen_tensors(model)):
        raise ValueError("Every parameter of this model is trained; pass what get_peft_model returned.")
    _refuse_meta(model)
    rows = [(name, str(t.dtype).removeprefix("torch."), t.nbytes, checksum(t)) for name, t in frozen.items()]
    return pd.DataFrame(rows, columns=["tensor", "dtype", "bytes", "checksum"]).set_index("tensor")


def summarize_training_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> pd.DataFrame:
    """What training keeps for the trainable parameters: their values, gradients and Adam's two averages.

    Call it after ``optimizer.step`` and before ``zero_grad``; without a step it raises ``ValueError``. In
    float32 it is 4 + 4 + 8 = 16 bytes each (https://huggingface.co/docs/transformers/model_memory_anatomy).

    Returns:
        Index ``part``; ``bytes`` and ``bytes_per_parameter``.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = [optimizer.state[parameter] for parameter in trained if parameter in optimizer.state]
    if not trained or len(states) < len(trained):
        raise ValueError(
            f"The optimizer holds a state for {len(states)} of {len(trained)} trainable tensors, expected "
            "all; pass the optimizer that trains this model, after its first step."
        )
    parts = {
        "weights": sum(p.nbytes for p in trained),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "Adam: mean of gradients": sum(state["exp_avg"].nbytes for state in states),
        "Adam: mean of squares": sum(state["exp_avg_sq"].nbytes for state in states),
    }
    table = pd.DataFrame({"bytes": parts}).rename_axis("part")
    return table.assign(bytes_per_parameter=table["bytes"] / sum(p.numel() for p in trained))


def check_adapter_is_noop(model: PeftModel, batch: Mapping[str, Any]) -> None:
    """Check that the adapter changes no logit: with it and without it, bit for bit, in the same mode.

    True right after ``get_peft_model``, as B is 0. Both passes run in evaluation mode, since int8 on a CPU
    computes differently in training mode; the model's modes are put back afterwards. The batch has
    ``input_ids`` of shape (rows, tokens), integers, on the model's device, and perhaps ``attention_mask``.

    Raises:
        AdapterNotNoopError: A logit differs; the message gives how many, by how much and which B is not 0.
        ValueError: No adapter, a merged or switched-off adapter, or a batch that the model cannot take.
    """
    layers = list(_lora_layers(model))
    _refuse_meta(model)
    inputs = checked_inputs(model, batch)
    if not hasattr(model, "disable_adapter"):
        raise ValueError(f"{type(model).__name__} cannot switch its adapter off; pass a PeftModel.")
    if any(layer.merged or layer.disable_adapters for _, layer, _ in layers):
        raise ValueError("The adapter is merged or switched off; pass what get_peft_model returned.")
    with evaluation_mode(model), torch.no_grad():
        adapted = model(**inputs, use_cache=False).logits
        with model.disable_adapter():
            base = model(**inputs, use_cache=False).logits
    if torch.equal(adapted, base):
        return
    moved = [_short(name) for name, layer, adapter in layers if layer.lora_B[adapter].weight.any()]
    raise AdapterNotNoopError(
        f"{int((adapted != base).sum()):,} of {base.numel():,} logits differ from the base model's, by up to "
        f"{(adapted.float() - base.float()).abs().max().item():.3g}; expected 0. B is not 0 in "
        f"{len(moved)} of {len(layers)} modules ({', '.join(moved[:3]) or 'none'}). An untrained adapter "
        "made with init_lora_weights=True is a no-op: check before the first optimizer step."
    )


def summarize_update(model: torch.nn.Module) -> pd.DataFrame:
    """The learned update (alpha / r) * B @ A of every adapted module, and its size beside W.

    The singular values are exact and cheap: two QR decompositions bring them down to an r x r matrix. All in
    float64; W is dequantized where it is quantized.

    Returns:
        Index ``module``; ``projection``, ``rank`` (singular values above rounding), ``stable_rank`` (sum of
        squared singular values over the largest squared: in how many directions the update really points),
        ``largest_singular_value``, ``update_norm`` and ``weight_norm`` (Frobenius) and ``relative_size``
        (their quotient).
    """
    _refuse_meta(model)
    return pd.DataFrame([_update_row(*found) for found in _lora_layers(model)]).set_index("module")


def plot_update_spectrum(model: torch.nn.Module) -> Axes:
    """Singular values of the update, for each projection the median over the layers: at most r."""
    _refuse_meta(model)
    spectra: dict[str, list[torch.Tensor]] = {}
    for name, layer, adapter in _lora_layers(model):
        spectra.setdefault(name.rpartition(".")[2], []).append(_singular_values(layer, adapter).cpu())
    axes: Any = new_axes(4.4)
    for i, (projection, group) in enumerate(spectra.items()):
        values = torch.stack(group).quantile(0.5, dim=0)
        style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 4, "linewidth": 1.2}
        axes.plot(range(1, len(values) + 1), values, label=projection, **style)
    r = max(group[0].numel() for group in spectra.values())
    axes.set_title(f"The {r} singular values that the update can have (median over the layers)")
    axes.set(xlabel="singular values, the largest first", ylabel="singular value of the update")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return axes


def _lora_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Name, PEFT layer and active adapter of every adapted module."""
    from peft.tuners.lora import LoraLayer

    found = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer) and len(m.lora_A)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no LoRA adapter; pass what get_peft_model(model, config) returned."
        )
    for name, layer in found:
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if len(active) != 1:
            raise ValueError(
                f"{_short(name)} has {len(active)} active adapters {active}; expected one. "
                "Choose with model.set_adapter(name)."
            )
        yield name, layer, active[0]


def _short(name: str) -> str:
    """``layers.0.mlp.up_proj`` instead of ``base_model.model.model.layers.0.mlp.up_proj``."""
    return re.sub(r"^.*?(?=layers\.\d)", "", name)


def _adapter_row(name: str, layer: Any, adapter: str) -> dict[str, Any]:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return {
        "projection": name.rpartition(".")[2],
        "A": tuple(a.shape),
        "B": tuple(b.shape),
        "r": layer.r[adapter],
        "alpha": layer.lora_alpha[adapter],
        "scaling": layer.scaling[adapter],
        "dtype": str(a.dtype).removeprefix("torch."),
        "size": a.numel() + b.numel(),
        "largest_entry_of_b": float("nan") if b.is_meta else b.detach().abs().max().item(),
    }


def _singular_values(layer: Any, adapter: str) -> torch.Tensor:
    """Of the update, float64, descending, as many as A has rows (fewer if W is smaller than that)."""
    a = layer.lora_A[adapter].weight.detach().double()
    b = layer.lora_B[adapter].weight.detach().double()
    _, right = torch.linalg.qr(a.T)
    _, left = torch.linalg.qr(b)
    return torch.linalg.svdvals(left @ right.T) * abs(layer.scaling[adapter])


def _update_row(name: str, layer: Any, adapter: str) -> dict[str, Any]:
    values = _singular_values(layer, adapter)
    largest, norm = values[0].item(), torch.linalg.vector_norm(values).item()
    rounding = max(layer.in_features, layer.out_features) * torch.finfo(values.dtype).eps
    weight_norm = _weight_norm(_short(name), layer.get_base_layer())
    return {
        "module": _short(name),
        "projection": name.rpartition(".")[2],
        "rank": int((values > largest * rounding).sum()),
        "stable_rank": (norm / largest) ** 2 if largest else 0.0,
        "largest_singular_value": largest,
        "update_norm": norm,
        "weight_norm": weight_norm,
        "relative_size": norm / weight_norm if weight_norm else float("nan"),
    }


def _weight_norm(name: str, linear: torch.nn.Linear) -> float:
    # Not by PEFT's dequantize_module_weight: on a CPU, an int8 layer that has run once cannot run after it.
    values = dequantize(name, linear) if is_quantized(linear) else linear.weight.detach()
    return torch.linalg.vector_norm(values, dtype=torch.float64).item()


def _refuse_meta(model: torch.nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("The model is on the meta device and has no values; load it with from_pretrained.")
