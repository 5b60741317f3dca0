"""Notebook 03: what 8-bit quantization does to the weights, the bytes and the predictions.

The formats are bitsandbytes' own: LLM.int8() (https://huggingface.co/papers/2208.07339), and the 4-bit
NormalFloat with double quantization of QLoRA (https://huggingface.co/papers/2305.14314). Every function
receives a model that the notebook made, and only reads it. A ``batch`` has ``input_ids`` and perhaps
``attention_mask``, each (rows, tokens), on the model's device; else they raise ``ValueError``.
"""

from __future__ import annotations

import contextlib
import functools
import html
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from llama_sft_helpers.core.batches import checked_inputs
from llama_sft_helpers.core.bnb import count_weights, dequantize, is_quantized, scale_tensors, storage_format
from llama_sft_helpers.core.modes import evaluation_mode
from llama_sft_helpers.quantization.layers import find_place, quantized_modules, read_weight, weight_name

if TYPE_CHECKING:
    from IPython.display import HTML

_GIB = 2**30


def summarize_layers(model: nn.Module) -> pd.DataFrame:
    """Count a model's parameters and bytes by layer class and storage type.

    Bytes include the scales that quantization keeps beside the weights; ``model.get_memory_footprint()``
    leaves them out. A matrix shared by two modules counts where it comes first.

    Returns:
        One row per class, dtype and reason, largest first: class, dtype, modules, parameters, bytes, gib,
        example (a module's name), why (it is stored so).

    Raises:
        ValueError: The model has no parameters.
    """
    rows: list[tuple[Any, ...]] = []
    seen: set[int] = set()
    quantized = any(is_quantized(module) for module in model.modules())
    for name, module in model.named_modules():
        own = list(dict(module.named_parameters(recurse=False, remove_duplicate=False)).values())
        if not own:
            continue
        fresh = [parameter for parameter in own if id(parameter) not in seen]
        seen.update(map(id, fresh))
        dtype = storage_format(module) or str(own[0].dtype).removeprefix("torch.")
        why = _why(name, module, shared=not fresh, quantized=quantized)
        size = sum(tensor.nbytes for tensor in (*fresh, *scale_tensors(module)))
        rows.append((type(module).__name__, dtype, why, 1, sum(map(count_weights, fresh)), size, name))
    if not rows:
        raise ValueError(
            f"{type(model).__name__} holds no parameters; pass a model that from_pretrained returned."
        )
    sums = {"modules": "sum", "parameters": "sum", "bytes": "sum", "example": "first"}
    table = pd.DataFrame(rows, columns=["class", "dtype", "why", *sums])
    table = table.groupby(["class", "dtype", "why"], sort=False, as_index=False).agg(sums)
    table["gib"] = table["bytes"] / _GIB
    table = table[["class", "dtype", "modules", "parameters", "bytes", "gib", "example", "why"]]
    return table.sort_values("bytes", ascending=False, ignore_index=True)


def summarize_forward_memory(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Measure what one forward pass of a batch needs beside the weights.

    The first pass is not measured, as it sets up buffers. On a GPU the allocator's peak is read; on the CPU
    PyTorch's profiler reports every allocation, and they are added up.

    Returns:
        One row, in GiB: weights_gib; peak_gib, the peak of what the pass allocates beside them; total_gib,
        the sum of the two; peak_without_logits_gib, the peak when only the last token's logits are computed.
    """
    inputs = checked_inputs(model, batch, least_tokens=2)
    weights = int(summarize_layers(model)["bytes"].sum())
    with evaluation_mode(model), torch.no_grad():
        model(**inputs, use_cache=False)
        without_logits = _peak_bytes(model, inputs | {"logits_to_keep": 1})
        peak = _peak_bytes(model, inputs)
    sizes = {"weights": weights, "peak": peak, "total": weights + peak, "peak_without_logits": without_logits}
    return pd.DataFrame([{f"{name}_gib": size / _GIB for name, size in sizes.items()}])


def render_side_by_side(left: nn.Module, right: nn.Module, titles: tuple[str, str]) -> HTML:
    """Two modules' own prints beside each other, as a table of two columns."""
    from IPython.display import HTML

    heads = "".join(f'<th style="text-align:left">{html.escape(title)}</th>' for title in titles)
    cells = "".join(
        f'<td style="text-align:left;vertical-align:top"><pre>{html.escape(repr(module))}</pre></td>'
        for module in (left, right)
    )
    return HTML(f"<table><tr>{heads}</tr><tr>{cells}</tr></table>")


def summarize_quantization_error(checkpoint: str | Path, quantized_model: nn.Module) -> pd.DataFrame:
    """Compare each quantized weight with the one it was made from, in the folder of its safetensors files.

    Only one matrix is held in float32 at once, and no second model is in memory.

    Returns:
        One row per projection: layer, module, format, relative_error (Frobenius norm of the difference over
        that of the reference), worst_row (its index), worst_row_error (the same ratio for that row), name.

    Raises:
        ValueError: Nothing is quantized, or a weight is missing or of another shape.
    """
    rows = []
    for name, module in quantized_modules(quantized_model, "int8", "nf4", "fp4").items():
        reference, restored = read_weight(checkpoint, weight_name(name)), dequantize(name, module)
        if reference.shape != restored.shape:
            raise ValueError(
                f"{name}: the reference has shape {tuple(reference.shape)}, the quantized model "
                f"{tuple(restored.shape)}. Pass the checkpoint that this model was loaded from."
            )
        place = find_place(name) | {"format": storage_format(module)}
        rows.append(place | _errors(reference, restored) | {"name": name})
    return pd.DataFrame(rows)


def summarize_outliers(
    model: nn.Module, batch: Mapping[str, torch.Tensor], threshold: float = 6.0
) -> pd.DataFrame:
    """Find the activations that LLM.int8() keeps out of the 8-bit product (its paper's section 3).

    A column of a ``Linear8bitLt``'s input in which any token reaches the threshold is an outlier channel: it
    is multiplied without being quantized. As in bitsandbytes, inputs are compared as float16 with ``>=``,
    and every position of the batch counts, padding included.

    Returns:
        One row per ``Linear8bitLt``: layer, module, outlier_values, values_share, outlier_channels,
        channels_share, largest_activation, channels (tuple of indices).

    Raises:
        ValueError: No int8 layers, or a threshold that is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"threshold={threshold!r} must be positive; LLM.int8()'s default is 6.0.")
    modules = quantized_modules(model, "int8")
    inputs = checked_inputs(model, batch, least_tokens=2)
    rows: dict[str, dict[str, Any]] = {}

    def watch(name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows[name] = find_place(name) | _outliers(args[0], threshold)

    with contextlib.ExitStack() as hooks, evaluation_mode(model), torch.no_grad():
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(functools.partial(watch, name)))
        model(**inputs, use_cache=False)
    return pd.DataFrame(list(rows.values()))


def summarize_predictions(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Score every token of a batch from those before it, by a causal language model.

    In evaluation mode, whatever mode the model was in: on the CPU int8 layers compute differently in training
    mode, so losses of the two modes cannot be compared.

    Returns:
        One row per scored token: row, position, label (its id), nll (negative log-likelihood in nats), top1
        (the id that the model found likeliest). The mean of nll is the loss; its exponential the perplexity.
    """
    inputs = checked_inputs(model, batch, least_tokens=2)
    frames = []
    with evaluation_mode(model), torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        for row, ids in enumerate(inputs["input_ids"]):
            labels = ids[1:].to(logits.device)
            scores = logits[row, :-1].float()  # one row at a time: float32 logits of a batch are large
            nll = nn.functional.cross_entropy(scores, labels, reduction="none")
            columns = {"label": labels, "nll": nll, "top1": scores.argmax(-1)}
            values = {name: column.cpu().numpy() for name, column in columns.items()}
            frame = pd.DataFrame({"row": row, "position": range(1, len(ids)), **values})
            mask = inputs.get("attention_mask")
            if mask is not None:  # neither a padding token, nor a token predicted from one
                real = mask[row].bool().cpu().numpy()
                frame = frame[real[1:] & real[:-1]]
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _why(name: str, module: nn.Module, *, shared: bool, quantized: bool) -> str:
    reasons = (
        (is_quantized(module), "quantized: an nn.Linear of a decoder layer"),
        ("lora_" in name, "LoRA factor: it is trained"),
        (shared, "shares the embedding's matrix, counted there"),
        (not quantized, "no quantization_config was given"),
        (isinstance(module, nn.Embedding), "a table that is looked up, not an nn.Linear"),
        (isinstance(module, nn.Linear), "output layer: its error would go straight into the logits"),
    )
    return next((reason for holds, reason in reasons if holds), "a vector, not an nn.Linear")


def _errors(reference: torch.Tensor, restored: torch.Tensor) -> dict[str, float | int]:
    reference = reference.to(restored.device, torch.float32)
    error = (reference - restored).norm(dim=1)
    size = reference.norm(dim=1)
    rows = torch.where(size > 0, error / size, error)
    return {
        "relative_error": (error.norm() / size.norm().clamp(min=1e-38)).item(),
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


def _peak_bytes(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    if inputs["input_ids"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**inputs, use_cache=False)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler prints a line at its start and end
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _outliers_of_the_last_pass(model), profile:
        model(**inputs, use_cache=False)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in changes), initial=0))


@contextlib.contextmanager
def _outliers_of_the_last_pass(model: nn.Module) -> Iterator[None]:
    """Hold them back: the profiler warns if memory that it does not know is freed."""
    states: list[Any] = [m.state for m in model.modules() if storage_format(m) == "int8"]
    kept = [state.idx for state in states]
    try:
        for state in states:
            state.idx = None
        yield
    finally:
        for state, idx in zip(states, kept, strict=True):
            state.idx = idx
