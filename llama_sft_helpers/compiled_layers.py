"""Decoder layers compiled one by one: the switch ``compile_decoder_layers`` of notebook 08.

``speed`` offers the public functions beside its own.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

# Python must launch a layer's backward pass faster than the GPU runs it: leave out its checks of sizes
_INDUCTOR = {"size_asserts": False, "alignment_asserts": False}


@dataclasses.dataclass
class CompiledLayers:
    """What ``compile_decoder_layers`` did, kept up to date while the model runs.

    Attributes:
        layers: Decoder layers that share the compiled code.
        activation_memory_budget: Share of activations kept.
        graphs: Graphs compiled so far.
        seconds: Time spent in compiling so far.
        fallback: Why some graph runs uncompiled; empty if none does.
    """

    layers: int
    activation_memory_budget: float
    most_graphs: int = 3
    graphs: int = 0
    seconds: float = 0.0
    fallback: str = ""
    _undo: list[Callable[[], Any]] = dataclasses.field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Run the layers uncompiled again."""
        while self._undo:
            self._undo.pop()()

    def _compile(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """Backend of ``torch.compile``: inductor with this budget, or the graph itself if that fails."""
        import torch._functorch.config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        if self.graphs >= self.most_graphs:
            self._fall_back(f"{self.most_graphs} graphs are compiled and another shape or mode came")
            return graph.forward
        self.graphs += 1
        try:
            settings: dict[str, Any] = {"activation_memory_budget": self.activation_memory_budget}
            if hasattr(functorch_config, "is_non_builtin_to_include"):
                settings["is_non_builtin_to_include"] = True  # our products cost as much as torch's own
            with functorch_config.patch(settings):
                compiled: Any = compile_fx(graph, inputs, config_patches=_INDUCTOR)
            gc.collect()
            gc.freeze()  # a compiler leaves a million objects, which the collector need not look at again
            self._undo.append(gc.unfreeze)
            return compiled
        except Exception as error:  # any failure of a compiler: the uncompiled graph computes the same
            self._fall_back(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return graph.forward

    def _fall_back(self, reason: str) -> None:
        self.fallback = reason
        warnings.warn(f"a decoder layer's graph runs uncompiled: {reason}", stacklevel=2)

    def _watch_time(self) -> None:
        from torch._dynamo.callback import callback_handler

        started: list[float] = []

        def begin(*_: Any) -> None:
            started.append(time.perf_counter())

        def end(*_: Any) -> None:
            if started:
                self.seconds += time.perf_counter() - started.pop()

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)
        self._undo.append(lambda: callback_handler.remove_start_callback(begin))
        self._undo.append(lambda: callback_handler.remove_end_callback(end))


def _decoder(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if all(hasattr(module, part) for part in ("layers", "embed_tokens", "rotary_emb")):
            return module
    raise ValueError(
        f"{type(model).__name__} has no decoder with layers, embed_tokens and rotary_emb; expected a "
        "Llama model, wrapped by PEFT or not."
    )


def compile_decoder_layers(model: torch.nn.Module, activation_memory_budget: float = 0.5) -> CompiledLayers:
    """Compile each decoder layer with ``torch.compile``; all layers share one graph for each mode.

    The graph's length is marked as changing from the first call, so that rows of another length do not
    compile again. Call it last: after ``get_peft_model``, after building the trainer, after
    ``use_fast_int8``.

    Args:
        model: A Llama model, wrapped by PEFT or not.
        activation_memory_budget: Share of the activations to keep for the backward pass, in (0, 1]; below 1
            the compiler recomputes the cheapest products, see
            https://pytorch.org/blog/activation-checkpointing-techniques/.

    Returns:
        A report: graphs and seconds of compilation so far, ``remove()`` to undo.

    Raises:
        ValueError: The budget is outside (0, 1], or the model has no decoder layers.
    """
    if not 0 < activation_memory_budget <= 1:
        raise ValueError(
            f"activation_memory_budget={activation_memory_budget!r} is outside (0, 1]; 1 keeps all "
            "activations, 0.5 about half."
        )
    decoder: Any = _decoder(model)
    report = CompiledLayers(len(decoder.layers), activation_memory_budget)
    report._watch_time()
    report._undo.append(remember_modules(model))
    for layer in decoder.layers:
        layer.compile(backend=report._compile)
        layer._compiled_call_impl = functools.partial(_call_layer, layer._compiled_call_impl, layer)
        report._undo.append(functools.partial(setattr, layer, "_compiled_call_impl", None))
    return report


class _Walks:
    """Answers what a walk over a root's modules would, until one registers a module or parameter."""

    def __init__(self, root: Any) -> None:
        self._root = weakref.ref(root)  # hooks of the whole process hold this: they must not hold the model
        self.forget()

    @property
    def root(self) -> Any:
        return self._root()

    def registered(self, parent: torch.nn.Module, name: str, module: Any) -> None:
        if id(parent) in self.known:  # and not, say, the list of layers that every forward pass slices anew
            self.forget()

    def forget(self) -> None:
        self.names: list[tuple[str, torch.nn.Module]] = []
        self.parameters: list[tuple[str, torch.nn.Parameter]] = []
        self.known: set[int] = set()
        self.numbers: dict[Any, int] = {}
        self.mode: bool | None = None

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        if memo is not None or prefix or not remove_duplicate:
            return type(self.root).named_modules(self.root, memo, prefix, remove_duplicate)
        if not self.names:
            self.names = list(type(self.root).named_modules(self.root))
            self.known = {id(module) for _, module in self.names}
        return iter(self.names)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        if prefix or not (recurse and remove_duplicate):
            return type(self.root).named_parameters(self.root, prefix, recurse, remove_duplicate)
        self.parameters = self.parameters or list(type(self.root).named_parameters(self.root))
        return iter(self.parameters)

    def train(self, mode: bool = True) -> Any:
        if self.mode != mode or self.root.training != mode:
            self.named_modules()  # to know whose new modules count
            type(self.root).train(self.root, mode)
            self.mode = mode
        return self.root

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        key = (args, tuple(kwargs.items()))
        if key not in self.numbers:
            self.named_modules()
            self.numbers[key] = type(self.root).num_parameters(self.root, *args, **kwargs)
        return self.numbers[key]


def remember_modules(model: torch.nn.Module) -> Callable[[], None]:
    """Walk the model's modules once instead of four times a step.

    ``Trainer`` sets the training mode, counts parameters, clips and zeroes gradients in every step, each
    time by a walk over all modules: 2,665 for a 32-layer Llama with LoRA, in Python, while the GPU waits.
    Registering a module or parameter in it makes the model walk again; call ``.train()`` and ``.eval()`` on
    the whole model, not on parts of it.

    Returns:
        A function that undoes it.
    """
    hooks = torch.nn.modules.module
    roots: list[Any] = [model]
    if callable(base_model := getattr(model, "get_base_model", None)):
        roots.append(base_model())
    undo: list[Callable[[], Any]] = []
    for root in roots:
        walks = _Walks(root)
        for name in ("named_modules", "named_parameters", "train", "num_parameters"):
            if hasattr(type(root), name):
                setattr(root, name, getattr(walks, name))
                undo.append(functools.partial(root.__dict__.pop, name, None))
        undo.append(hooks.register_module_module_registration_hook(walks.registered).remove)
        undo.append(hooks.register_module_parameter_registration_hook(walks.registered).remove)

    def restore() -> None:
        while undo:
            undo.pop()()

    return restore


def _call_layer(compiled: Callable[..., Any], layer: Any, hidden: torch.Tensor, **kwargs: Any) -> Any:
    """Run one layer compiled, with everything that changes between batches marked as a changing shape."""
    # generation: the cache grows with every token; newer versions of transformers call it `cache`
    if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
        return layer._call_impl(hidden, **kwargs)
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = (
            hidden.detach().requires_grad_()
        )  # as every later layer's input, so that the first shares their graph
    longest, bounds = kwargs.pop("max_length_q", None), kwargs.get("cu_seq_lens_q")
    for name in ("max_length_k", "cu_seq_lens_k", "seq_idx"):
        kwargs.pop(name, None)
    if bounds is not None and longest is not None:  # a number would be compiled in; a shape may change
        kwargs["longest_document"] = torch.empty((), device=bounds.device).expand(int(longest))
        _mark(kwargs["longest_document"], 0)
        _mark(bounds, 0)
    for tensor in (hidden, kwargs.get("position_ids"), *(kwargs.get("position_embeddings") or ())):
        _mark(tensor, 1)
    for dim in (2, 3):
        _mark(kwargs.get("attention_mask"), dim)
    return compiled(hidden, **kwargs)


def _mark(tensor: Any, dim: int) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.dim() > dim and tensor.shape[dim] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def check_graphs(compiled: CompiledLayers, most: int = 3) -> None:
    """Raise if compilation did not settle within ``most`` graphs, or some graph runs uncompiled.

    Raises:
        AssertionError: With the number of graphs, the limit, and what to do.
    """
    if compiled.graphs > most or compiled.fallback:
        raise AssertionError(
            f"{compiled.graphs} graphs were compiled, expected at most {most}; uncompiled: "
            f"{compiled.fallback or 'none'}. Keep batch sizes equal, and switch everything "
            "on before the first step."
        )
