"""Notebook 03: what 8-bit quantization does to the weights, the bytes and the predictions.

The formats are bitsandbytes' own: LLM.int8() (https://huggingface.co/papers/2208.07339), and the 4-bit
NormalFloat with double quantization of QLoRA (https://huggingface.co/papers/2305.14314). Every function
receives a model, a weight or a config that the notebook made, and only reads it.
"""

from __future__ import annotations

import html
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.axes import Axes

_GIB = 2**30
_NF4_BLOCK = 64  # weights that share one scale
_NESTED_BLOCK = 256  # scales that share one scale of the second quantization
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
_LOAD_INT8 = "from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_8bit=True))"


# --- Absmax quantization ---


def quantize_absmax(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix row by row: a row's largest magnitude becomes level 127 (symmetric, no zero point).

    ``codes = round(weight * (127 / absmax))``, so one step of a row is ``absmax / 127``. This is what
    ``bitsandbytes.functional.int8_vectorwise_quant`` computes on the CPU, bit for bit: weights are cast to
    float16 first (whatever the checkpoint's type), the scales are float32, a tie goes to the even level, a row
    of zeros keeps zeros.

    bitsandbytes' CUDA kernel differs in one place: it takes ``127 / absmax`` from a fast division that may
    be off by two units in the last place. Scales are equal there too; a weight on a tie (exactly half of its
    row's absmax is level 63.5) can land one level away.

    Args:
        weight: Floating-point matrix, shape (d_out, d_in).

    Returns:
        The codes, int8, shape (d_out, d_in), in [-127, 127]; the absmax of each row, float32, shape (d_out,).

    Raises:
        ValueError: Not a floating-point matrix, an empty one, or one with values that float16 cannot hold.

    Paper: https://huggingface.co/papers/2208.07339, section 2.1.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"quantize_absmax got a tensor of shape {tuple(weight.shape)} and type {weight.dtype}; "
            "it takes a floating-point matrix (d_out, d_in), such as a Linear's weight before quantization."
        )
    half = weight.detach().to(torch.float16)
    if not half.isfinite().all():
        raise ValueError(
            f"The weight holds NaN, infinity or values beyond float16's 65504 (largest magnitude "
            f"{weight.detach().abs().max().item():g}): bitsandbytes cannot quantize it. Check the checkpoint."
        )
    absmax = half.abs().amax(dim=1).float()
    scaled = half * (127.0 / absmax)[:, None]  # float16 * float32 is computed in float32
    codes = torch.where(absmax[:, None] > 0, scaled.round(), 0.0).to(torch.int8)
    return codes, absmax


# --- Layers and bytes ---


def summarize_layers(model: nn.Module) -> pd.DataFrame:
    """Count a model's parameters and bytes by layer class and storage type.

    Bytes include the scales that quantization keeps beside the weights; ``model.get_memory_footprint()``
    leaves them out. A matrix shared by two modules counts where it comes first.

    Returns:
        One row per (class, dtype), largest first: class, dtype, modules, parameters, bytes, gib, example
        (a module's name), why (it is stored so).

    Raises:
        ValueError: The model has no parameters.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[int] = set()
    quantized = any(_is_quantized(module) for module in model.modules())
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if not own:
            continue
        dtype = str(next(iter(own.values())).dtype).removeprefix("torch.")
        key = (type(module).__name__, _format(module) or dtype)
        row = rows.setdefault(key, {"modules": 0, "parameters": 0, "bytes": 0, "example": name, "why": ""})
        row["modules"] += 1
        fresh = [parameter for parameter in own.values() if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in fresh)
        row["parameters"] += sum(_count(parameter) for parameter in fresh)
        row["bytes"] += sum(p.numel() * p.element_size() for p in fresh)
        row["bytes"] += sum(t.numel() * t.element_size() for t in _scales(module))
        row["why"] = row["why"] or _why(name, module, shared=not fresh, quantized=quantized)
    if not rows:
        raise ValueError(
            f"{type(model).__name__} holds no parameters; pass a model that from_pretrained returned."
        )
    table = pd.DataFrame([{"class": c, "dtype": d, **row} for (c, d), row in rows.items()])
    table.insert(5, "gib", table["bytes"] / _GIB)
    return table.sort_values("bytes", ascending=False, ignore_index=True)


def summarize_memory(config: Any, dtype: torch.dtype = torch.bfloat16) -> pd.DataFrame:
    """Predict a Llama model's bytes from its config alone, in five formats.

    bitsandbytes quantizes the seven projections of each decoder layer. Embeddings, the output layer
    (``lm_head``) and the norms stay in ``dtype``. Beside the codes it keeps:

    - int8: one float32 absmax per row (``SCB``);
    - nf4: one float32 absmax per block of 64 weights and the table of 16 levels per matrix;
    - nf4 with double quantization: those absmax values as uint8, in blocks of 256 with a float32 absmax each,
      and per matrix their float32 offset and a table of 256 levels.

    Args:
        config: A ``LlamaConfig``.
        dtype: Type of what is not quantized, in the int8 and nf4 rows.

    Returns:
        Index format (``fp32``, ``bf16``, ``int8``, ``nf4``, ``nf4 single``); ``bf16`` stands for float16 too,
        ``nf4`` is with double quantization. Columns in GiB: projections_gib (codes), scales_gib, rest_gib,
        total_gib; total_bytes; bits_per_weight of a projection, scales included.

    Raises:
        ValueError: The config is not that of a Llama model.
    """
    shapes, rest = _linear_shapes(config), _rest_parameters(config)
    weights = sum(d_out * d_in for d_out, d_in in shapes)
    rows = {}
    for name, bits, size in (
        ("fp32", 32, 4),
        ("bf16", 16, 2),
        ("int8", 8, dtype.itemsize),
        ("nf4", 4, dtype.itemsize),
        ("nf4 single", 4, dtype.itemsize),
    ):
        codes = sum(math.ceil(d_out * d_in * bits / 8) for d_out, d_in in shapes)
        scales = sum(_scale_bytes(name, d_out, d_in) for d_out, d_in in shapes)
        total = codes + scales + rest * size
        rows[name] = {
            "projections_gib": codes / _GIB,
            "scales_gib": scales / _GIB,
            "rest_gib": rest * size / _GIB,
            "total_gib": total / _GIB,
            "total_bytes": total,
            "bits_per_weight": 8 * (codes + scales) / weights,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("format")


def summarize_forward_memory(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Measure what one forward pass of a batch needs beside the weights.

    The first pass is not measured, as it sets up buffers. On a GPU the allocator's peak is read; on the CPU
    PyTorch's profiler reports every allocation, and they are added up.

    Returns:
        One row, in GiB: weights_gib; layers_gib, the peak of activations and temporary copies when only the
        last token's logits are computed; working_gib, the peak with all logits; total_gib, weights and
        working.

    Raises:
        ValueError: The batch is empty or on another device than the model.
    """
    inputs = _checked(model, batch)
    weights = int(summarize_layers(model)["bytes"].sum())
    with _evaluating(model):
        model(**inputs, use_cache=False)
        layers = _peak_bytes(model, inputs | {"logits_to_keep": 1})
        working = _peak_bytes(model, inputs)
    sizes = {
        "weights_gib": weights,
        "layers_gib": layers,
        "working_gib": working,
        "total_gib": weights + working,
    }
    return pd.DataFrame([{name: size / _GIB for name, size in sizes.items()}])


def render_side_by_side(left: nn.Module, right: nn.Module, titles: tuple[str, str]) -> HTML:
    """Two modules' own prints beside each other.

    Returns:
        An HTML table of two columns.
    """
    from IPython.display import HTML

    heads = "".join(f'<th style="text-align:left">{html.escape(title)}</th>' for title in titles)
    cells = "".join(
        f'<td style="text-align:left;vertical-align:top"><pre>{html.escape(repr(module))}</pre></td>'
        for module in (left, right)
    )
    return HTML(f"<table><tr>{heads}</tr><tr>{cells}</tr></table>")


# --- Error of the weights ---


def summarize_quantization_error(
    reference_model: nn.Module | str | Path, quantized_model: nn.Module
) -> pd.DataFrame:
    """Compare each quantized weight with the one it was made from, one matrix at a time.

    Only one matrix is held in float32 at once: an 8B model can be compared with its own checkpoint, and no
    second model is in memory.

    Args:
        reference_model: The folder of the safetensors checkpoint that was quantized, or the model before
            quantization (any device).
        quantized_model: The int8 or nf4 model, as loaded.

    Returns:
        One row per projection: layer, module, format, relative_error (Frobenius norm of the difference over
        that of the reference), worst_row (its index), worst_row_error (the same ratio for that row), name.

    Raises:
        ValueError: Nothing is quantized, the reference is, or a weight is missing or of another shape.
    """
    modules = _quantized_modules(quantized_model)
    rows = []
    with _reference_reader(reference_model) as read:
        for name, module in modules.items():
            reference = read(f"{_base_name(name)}.weight")
            restored = _dequantize(name, module)
            if reference.shape != restored.shape:
                raise ValueError(
                    f"{name}: the reference has shape {tuple(reference.shape)}, the quantized model "
                    f"{tuple(restored.shape)}. Pass the checkpoint that this model was loaded from."
                )
            layer, short = _place(name)
            rows.append(
                {"layer": layer, "module": short, "format": _format(module), **_errors(reference, restored)}
                | {"name": name}
            )
    return pd.DataFrame(rows)


def plot_quantization_error(errors: pd.DataFrame) -> Axes:
    """Draw the relative error of every projection over the depth of the model.

    Args:
        errors: ``summarize_quantization_error``'s table, or several of them concatenated.

    Returns:
        Axes: decoder layer against relative Frobenius error in %, log scale; a colour per module, a line
        style per format.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    ax = _new_axes(7.2, 4.6)
    styles = dict(zip(errors["format"].unique(), (("-", "o"), ("--", "s"), (":", "^")), strict=False))
    colours = dict(zip(errors["module"].unique(), _OKABE_ITO, strict=False))
    for (module, kind), group in errors.groupby(["module", "format"], sort=False):
        line, marker = styles[kind]
        shown = group.sort_values("layer")
        ax.plot(
            shown["layer"],
            100 * shown["relative_error"],
            line,
            marker=marker,
            ms=3,
            lw=1.2,
            color=colours[module],
        )
    handles = [Line2D([], [], color=colour, lw=3, label=module) for module, colour in colours.items()]
    handles += [
        Line2D([], [], color="#555555", ls=ls, marker=m, label=kind) for kind, (ls, m) in styles.items()
    ]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    ax.set(
        yscale="log", xlabel="decoder layer", ylabel="relative error of the weight (%)",
        title=f"Error that quantization adds to each weight matrix ({', '.join(styles)})",
    )  # fmt: skip
    _percent_ticks(ax)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def plot_weight_grid(weight: torch.Tensor, row: int = 0) -> Axes:
    """Draw one row of a weight on the 255 levels of its int8 grid.

    Args:
        weight: Matrix before quantization, shape (d_out, d_in).
        row: Output feature to show.

    Returns:
        Axes: weights per level over the weight's value; an inset enlarges six steps around zero.

    Raises:
        ValueError: The matrix has no such row.
    """
    import numpy as np

    codes, absmax = quantize_absmax(weight)
    if not 0 <= row < len(weight):
        raise ValueError(f"row={row} is not a row of this matrix; it has rows 0 to {len(weight) - 1}.")
    values, step = weight[row].detach().float().cpu().numpy(), absmax[row].item() / 127
    if not step:
        raise ValueError(f"Row {row} holds only zeros and has no grid; choose another row.")
    counts = torch.bincount(codes[row].long().cpu() + 127, minlength=255)
    levels = [step * level for level in range(-127, 128)]
    ax = _new_axes(7.2, 4.2)
    ax.bar(levels, counts.tolist(), width=step, color=_OKABE_ITO[0])
    ax.set(
        xlabel="weight", ylabel="weights per level",
        title=f"Row {row}: {len(values)} weights on 255 levels, one step = {step:.3g}",
    )  # fmt: skip
    ax.margins(y=0.1)
    top = ax.secondary_xaxis("top", functions=(lambda x: np.divide(x, step), lambda x: np.multiply(x, step)))
    top.set_xlabel("int8 code")
    zoom = ax.inset_axes((0.66, 0.5, 0.33, 0.42))
    near = values[abs(values) < 3.5 * step]
    zoom.hist(near / step, bins=42, range=(-3.5, 3.5), color=_OKABE_ITO[4])
    for level in range(-3, 4):
        zoom.axvline(level, color=_OKABE_ITO[3], lw=1)
    zoom.set_title("before rounding; lines: levels", fontsize=8)
    zoom.tick_params(labelsize=8)
    zoom.set_xlabel("weight / step", fontsize=8)
    return ax


# --- Outliers of the activations ---


def summarize_outliers(
    model: nn.Module, batch: Mapping[str, torch.Tensor], threshold: float = 6.0
) -> pd.DataFrame:
    """Find the activations that LLM.int8() keeps out of the 8-bit product.

    A column of a ``Linear8bitLt``'s input in which any token reaches the threshold is an outlier channel: it
    is multiplied without being quantized. As in bitsandbytes, inputs are compared as float16 with ``>=``,
    and every position of the batch counts, padding included.

    Args:
        model: A model with ``Linear8bitLt`` layers, on any device.
        batch: ``input_ids`` and ``attention_mask``, each (rows, tokens), on the model's device.
        threshold: Magnitude from which an activation is an outlier; ``llm_int8_threshold`` is 6.0 by default.

    Returns:
        One row per ``Linear8bitLt``: layer, module, outlier_values, values_share, outlier_channels,
        channels_share, largest_activation, channels (tuple of indices).

    Raises:
        ValueError: No int8 layers, an empty batch, one on another device, or a threshold that is not
            positive.

    Paper: https://huggingface.co/papers/2208.07339, section 3.
    """
    if threshold <= 0:
        raise ValueError(f"threshold={threshold!r} must be positive; LLM.int8()'s default is 6.0.")
    modules = {n: m for n, m in model.named_modules() if _format(m) == "int8"}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no Linear8bitLt layer, and the threshold is theirs. Pass a model "
            f"loaded with {_LOAD_INT8}."
        )
    inputs = _checked(model, batch)
    rows: dict[str, dict[str, Any]] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows[name] = _outliers(args[0], threshold)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        with _evaluating(model):
            model(**inputs, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    places = {name: dict(zip(("layer", "module"), _place(name), strict=True)) for name in rows}
    return pd.DataFrame([places[name] | row for name, row in rows.items()])


def plot_outliers(outliers: pd.DataFrame) -> Axes:
    """Draw how many channels of each layer's input are outliers.

    Args:
        outliers: ``summarize_outliers``'s table.

    Returns:
        Axes: a heat map, decoder layer by module. Colour: share of channels in %; number: their count.
    """
    from matplotlib.colors import PowerNorm

    order = sorted(outliers["module"].unique(), key=lambda m: (*_PROJECTIONS, m).index(m))
    shares = 100 * outliers.pivot_table(index="layer", columns="module", values="channels_share")[order]
    counts = outliers.pivot_table(index="layer", columns="module", values="outlier_channels")[order]
    ax = _new_axes(7.2, 1.6 + 0.26 * len(shares))
    # a square root scale, so that one channel among hundreds differs from none
    image = ax.imshow(shares, aspect="auto", cmap="cividis", norm=PowerNorm(0.5, vmin=0))
    ax.figure.colorbar(image, ax=ax, label="outlier channels (% of the input's channels)")
    for y in range(len(shares)):
        for x in range(len(order)):
            dark = image.norm(float(shares.to_numpy()[y, x])) < 0.5
            ax.text(
                x, y, f"{counts.iloc[y, x]:.0f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
    ax.set_xticks(range(len(order)), order)
    ax.set_yticks(range(len(shares)), shares.index)
    ax.set(
        xlabel="module whose input is measured", ylabel="decoder layer", title="Outlier channels per layer"
    )
    return ax


# --- Effect on the predictions ---


def summarize_predictions(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Score every token of a batch from those before it.

    In evaluation mode, whatever mode the model was in: on the CPU int8 layers compute differently in training
    mode, so losses of the two modes cannot be compared.

    Args:
        model: A causal language model.
        batch: ``input_ids`` and ``attention_mask``, each (rows, tokens), on the model's device.

    Returns:
        One row per scored token: row, position, label (its id), nll (negative log-likelihood in nats), top1
        (the id that the model found likeliest). The mean of nll is the loss; its exponential the perplexity.

    Raises:
        ValueError: The batch is empty, or on another device than the model.
    """
    inputs = _checked(model, batch)
    frames = []
    with _evaluating(model):
        logits = model(**inputs, use_cache=False).logits
        for row, ids in enumerate(inputs["input_ids"]):
            labels = ids[1:].to(logits.device)
            scores = logits[row, :-1].float()  # one row at a time: float32 logits of a batch are large
            frame = pd.DataFrame(
                {
                    "row": row,
                    "position": range(1, len(ids)),
                    "label": labels.cpu().numpy(),
                    "nll": nn.functional.cross_entropy(scores, labels, reduction="none").cpu().numpy(),
                    "top1": scores.argmax(-1).cpu().numpy(),
                }
            )
            mask = inputs.get("attention_mask")
            frames.append(frame if mask is None else frame[mask[row, 1:].bool().cpu().numpy()])
    return pd.concat(frames, ignore_index=True)


# --- Shared pieces ---


def _format(module: nn.Module) -> str | None:
    """``int8``, ``nf4`` or ``fp4`` for a bitsandbytes layer, None for any other."""
    weight = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Int8Params" and weight is not None and weight.dtype == torch.int8:
        return "int8"
    if kind == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        return str(getattr(weight, "quant_type", "nf4"))
    return None


def _is_quantized(module: nn.Module) -> bool:
    return _format(module) is not None


def _absmax(module: Any) -> torch.Tensor:
    """An int8 layer's scales: the first forward pass moves them from the weight to the state."""
    return module.weight.SCB if module.weight.SCB is not None else module.state.SCB


def _scales(module: Any) -> Iterator[torch.Tensor]:
    """Tensors that a quantized layer keeps beside its codes."""
    if _format(module) == "int8":
        yield _absmax(module)
    elif _is_quantized(module):
        state = module.weight.quant_state
        nested = getattr(state, "state2", None)
        tables = (state.absmax, state.code, *((state.offset, nested.absmax, nested.code) if nested else ()))
        yield from tables


def _count(parameter: Any) -> int:
    """Weights that a parameter stands for: nf4 packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _why(name: str, module: nn.Module, *, shared: bool, quantized: bool) -> str:
    reasons = (
        (_is_quantized(module), "quantized: an nn.Linear of a decoder layer"),
        ("lora_" in name, "LoRA factor: it is trained"),
        (shared, "shares the embedding's matrix, counted there"),
        (not quantized, "no quantization_config was given"),
        (isinstance(module, nn.Embedding), "a table that is looked up, not an nn.Linear"),
        (isinstance(module, nn.Linear), "output layer: its error would go straight into the logits"),
    )
    return next((reason for holds, reason in reasons if holds), "a vector, not an nn.Linear")


def _linear_shapes(config: Any) -> list[tuple[int, int]]:
    """(d_out, d_in) of every projection that bitsandbytes quantizes."""
    _require_llama(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    mlp = [(inner, hidden), (inner, hidden), (hidden, inner)]
    return (attention + mlp) * config.num_hidden_layers


def _rest_parameters(config: Any) -> int:
    """Parameters that stay in 16 bits: embeddings, output layer unless tied, norms, biases."""
    shapes = _linear_shapes(config)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    with_bias = (config.attention_bias,) * 4 + (config.mlp_bias,) * 3
    biases = sum(
        shape[0] for shape, bias in zip(shapes, with_bias * config.num_hidden_layers, strict=True) if bias
    )
    return int(tables + norms + biases)


def _require_llama(config: Any) -> None:
    if getattr(config, "model_type", None) != "llama":
        raise ValueError(
            f"Got a {type(config).__name__} (model_type {getattr(config, 'model_type', None)!r}); expected a "
            "LlamaConfig, for instance model.config or AutoConfig.from_pretrained(model_id)."
        )


def _scale_bytes(kind: str, d_out: int, d_in: int) -> int:
    """Bytes that bitsandbytes keeps beside the codes of one matrix; see ``summarize_memory``."""
    blocks = math.ceil(d_out * d_in / _NF4_BLOCK)
    if kind == "int8":
        return 4 * d_out
    if kind == "nf4":
        return blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + 4 + 4 * 256 + 4 * 16
    return 4 * blocks + 4 * 16 if kind == "nf4 single" else 0


def _quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if _is_quantized(module)}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no bitsandbytes layer. Pass a model loaded with {_LOAD_INT8}, or "
            "with load_in_4bit=True."
        )
    return modules


def _base_name(name: str) -> str:
    """A module's name in the checkpoint: PEFT puts a prefix before it and wraps the layer."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _place(name: str) -> tuple[int, str]:
    name = _base_name(name)
    match = re.search(r"\.layers\.(\d+)\.", name)
    return (int(match.group(1)) if match else -1), name.rpartition(".")[2]


@contextmanager
def _reference_reader(reference: nn.Module | str | Path) -> Iterator[Any]:
    """A function that gives one reference weight by its name in the checkpoint."""
    if isinstance(reference, nn.Module):
        if any(_is_quantized(module) for module in reference.modules()):
            raise ValueError(
                "reference_model is quantized itself. Pass the model before quantization, or the folder of "
                "its safetensors checkpoint."
            )
        weights = dict(reference.named_parameters(remove_duplicate=False))
        yield lambda name: _found(name, weights.get(name))
        return
    files = _index_checkpoint(Path(reference))
    from safetensors import safe_open

    def read(name: str) -> torch.Tensor:
        if name not in files:
            return _found(name, None)
        with safe_open(files[name], framework="pt") as shard:
            return _found(name, shard.get_tensor(name))

    yield read


def _index_checkpoint(folder: Path) -> dict[str, Path]:
    """Weight name -> the safetensors file that holds it."""
    from safetensors import safe_open

    shards = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not shards:
        raise ValueError(
            f"{folder} is not a folder with .safetensors files. Pass the checkpoint's folder, such as "
            "huggingface_hub.snapshot_download(model_id) returns."
        )
    files = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            files.update(dict.fromkeys(opened.keys(), shard))
    return files


def _found(name: str, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None or weight.is_meta:
        state = "holds no" if weight is None else "keeps on disk (offloaded), not in memory, its"
        raise ValueError(
            f"The reference {state} {name}. Pass the checkpoint that the quantized model was loaded from."
        )
    return weight.detach()


def _dequantize(name: str, module: Any) -> torch.Tensor:
    """The matrix that a quantized layer stands for, float32, on its device."""
    import bitsandbytes.functional as bnb

    weight = module.weight
    if _format(module) == "int8":
        return bnb.int8_vectorwise_dequant(weight.data, _absmax(module))
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}: a forward pass on this CPU has repacked the 4-bit codes (bitsandbytes does so where "
            "the CPU has AVX512-BF16). Load the model again and compare it before the first forward pass."
        )
    return bnb.dequantize_4bit(weight.data, weight.quant_state).float()


def _errors(reference: torch.Tensor, restored: torch.Tensor) -> dict[str, float | int]:
    reference = reference.to(restored.device, torch.float32)
    error = (reference - restored).norm(dim=1)
    size = reference.norm(dim=1)
    rows = torch.where(size > 0, error / size, error)
    return {
        "relative_error": (error.norm() / size.norm()).item(),
        "worst_row": int(rows.argmax()),
        "worst_row_error": rows.max().item(),
    }


def _outliers(activations: torch.Tensor, threshold: float) -> dict[str, Any]:
    magnitudes = activations.detach().reshape(-1, activations.shape[-1]).to(torch.float16).abs()
    beyond = magnitudes >= threshold
    channels = beyond.any(dim=0)
    return {
        "outlier_values": int(beyond.sum()),
        "values_share": beyond.float().mean().item(),
        "outlier_channels": int(channels.sum()),
        "channels_share": channels.float().mean().item(),
        "largest_activation": magnitudes.max().item(),
        "channels": tuple(channels.nonzero().flatten().tolist()),
    }


def _checked(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch's tensors, or an error that says what to pass."""
    inputs = {k: v for k, v in dict(batch).items() if k in ("input_ids", "attention_mask")}
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
        got = (
            f"input_ids of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        )
        raise ValueError(
            f"The batch is empty or not a batch ({got}). Pass tokenizer(texts, return_tensors='pt', "
            "padding=True) of at least one text of two tokens."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not mask[:, 1:].any():
        raise ValueError("The batch holds only padding (attention_mask is 0). Pass at least one text.")
    device = next(p for p in model.parameters() if not p.is_meta).device
    if ids.device != device:
        raise ValueError(f"The batch is on {ids.device}, the model on {device}. Pass batch.to(model.device).")
    return inputs


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode that was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _peak_bytes(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    if inputs["input_ids"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**inputs, use_cache=False)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler prints a line at its start and end
    for module in model.modules():
        if _format(module) == "int8":  # the last pass's indices: freed inside, they would bring a warning
            module.state.idx = None  # type: ignore[union-attr]
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        model(**inputs, use_cache=False)
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def _new_axes(width: float, height: float) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _percent_ticks(ax: Axes) -> None:
    """Plain numbers on a log axis that may span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)
