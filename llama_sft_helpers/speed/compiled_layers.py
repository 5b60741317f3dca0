"""Decoder layers compiled one by one: the switch ``compile_decoder_layers`` of notebook 08."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:  # a mixin: what it overrides comes with the trainer it is mixed into
    _Trainer = object

# Python must launch a layer's backward pass faster than the GPU runs it: leave out its checks of sizes
_INDUCTOR = {"size_asserts": False, "alignment_asserts": False}
_MOST_GRAPHS = 3  # training, evaluation, and one longer bound of attention


@dataclasses.dataclass
class CompiledLayers:
    """What ``compile_decoder_layers`` did, kept up to date while the model runs.

    Attributes:
        activation_memory_budget: Share of activations kept.
        graphs: Graphs compiled so far.
        seconds: Time spent in compiling so far.
        fallback: Why some graph runs uncompiled; empty if none does.
    """

    activation_memory_budget: float
    graphs: int = 0
    seconds: float = 0.0
    fallback: str = ""
    _undo: list[Callable[[], Any]] = dataclasses.field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Run the layers uncompiled again."""
        while self._undo:
            self._undo.pop()()

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Backend of ``torch.compile``: inductor with this budget, or the graph itself if that fails."""
        import torch._functorch.config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        if self.graphs >= _MOST_GRAPHS:
            self._fall_back(f"{_MOST_GRAPHS} graphs are compiled and another shape or mode came")
            return graph.forward
        self.graphs += 1
        try:
            settings: dict[str, Any] = {"activation_memory_budget": self.activation_memory_budget}
            if hasattr(functorch_config, "is_non_builtin_to_include"):
                settings["is_non_builtin_to_include"] = True  # our products cost as much as torch's own
            with functorch_config.patch(settings):
                compiled: Any = compile_fx(graph, inputs, config_patches=_INDUCTOR)
            return compiled
        except Exception as error:  # any failure of a compiler: the uncompiled graph computes the same
            self._fall_back(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return graph.forward

    def _take_over(self, layer: Any) -> None:
        """Put the compiled layer in the place of the instance's ``forward``."""
        forward = vars(layer).get("forward")
        if forward is not None and getattr(forward, "func", None) is not _call_layer:
            self._fall_back(f"another library runs {type(layer).__name__} ({forward!r})")
            return
        compiled = torch.compile(type(layer).forward, backend=self._compile)
        layer.forward = functools.partial(_call_layer, compiled, layer)
        self._undo.append(functools.partial(vars(layer).pop, "forward", None))

    def _fall_back(self, reason: str) -> None:
        self.fallback = reason
        warnings.warn(f"a decoder layer's graph runs uncompiled: {reason}", stacklevel=2)

    def _watch_time(self) -> None:
        from torch._dynamo.callback import callback_handler

        started: list[float] = []

        def begin(*_: object) -> None:
            started.append(time.perf_counter())

        def end(*_: object) -> None:
            if started:
                self.seconds += time.perf_counter() - started.pop()

        def stop() -> None:
            with contextlib.suppress(ValueError):  # torch._dynamo.reset() has removed them
                callback_handler.remove_start_callback(begin)
                callback_handler.remove_end_callback(end)

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)
        self._undo.append(stop)


def _decoder(model: torch.nn.Module) -> Any:
    for module in model.modules():
        if all(hasattr(module, part) for part in ("layers", "embed_tokens", "rotary_emb")):
            return module
    raise ValueError(
        f"{type(model).__name__} has no decoder with layers, embed_tokens and rotary_emb; expected a "
        "Llama model, wrapped by PEFT or not."
    )


def compile_decoder_layers(model: torch.nn.Module, activation_memory_budget: float = 0.5) -> CompiledLayers:
    """Compile each decoder layer with ``torch.compile``; all layers share one graph for each mode.

    Rows of another length do not compile again. Call it last: after ``get_peft_model``, after building the
    trainer, after ``use_fast_int8``. The budget is the share of the activations to keep for the backward
    pass, in (0, 1]; below 1 the compiler recomputes the cheapest products:
    https://pytorch.org/blog/activation-checkpointing-techniques/.

    Returns:
        A report: graphs and seconds of compilation so far, ``remove()`` to undo. Each layer's instance gets
        another ``forward``, as ``layer.compile()`` cannot be undone; a deep copy of the model stays compiled.

    Raises:
        ValueError: The budget is outside (0, 1], or the model has no decoder layers.
    """
    if not 0 < activation_memory_budget <= 1:
        raise ValueError(
            f"activation_memory_budget={activation_memory_budget!r} is outside (0, 1]; 1 keeps all "
            "activations, 0.5 about half."
        )
    report = CompiledLayers(activation_memory_budget)
    report._watch_time()
    for layer in _decoder(model).layers:
        report._take_over(layer)
    return report


def _call_layer(
    compiled: Callable[..., Any], layer: torch.nn.Module, hidden: torch.Tensor, **kwargs: Any
) -> Any:
    """Run one layer compiled, with everything that changes between batches marked as a changing shape."""
    # generation: the cache grows with every token; newer versions of transformers call it `cache`
    if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
        return type(layer).forward(layer, hidden, **kwargs)
    if torch.is_grad_enabled() and not hidden.requires_grad:
        # as every later layer's input, so that the first layer shares their graph
        hidden = hidden.detach().requires_grad_()
    for name in ("max_length_k", "cu_seq_lens_k", "seq_idx"):
        kwargs.pop(name, None)
    if kwargs.get("max_length_q") is not None:
        kwargs["max_length_q"] = _round_up(int(kwargs["max_length_q"]))
    _mark(kwargs.get("cu_seq_lens_q"), 0)
    for tensor in (hidden, kwargs.get("position_ids"), *(kwargs.get("position_embeddings") or ())):
        _mark(tensor, 1)
    for dim in (2, 3):
        _mark(kwargs.get("attention_mask"), dim)
    return compiled(layer, hidden, **kwargs)


def _round_up(longest: int) -> int:
    """A bound of the longest document that hardly changes: numbers are compiled in, a new one compiles anew.

    Attention works in blocks of 128 tokens and leaves at once what lies beyond a document's end: a bound of
    16 times the true length costs 0.27 ms a layer (``benchmarks/NOTES.md``), 1024 for 600 next to none.
    """
    return max(1024, 1 << (longest - 1).bit_length())


def _mark(tensor: object, dim: int) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.dim() > dim and tensor.shape[dim] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def check_graphs(compiled: CompiledLayers) -> None:
    """Check that every layer runs compiled, which more shapes or modes than graphs prevent as well.

    Raises:
        AssertionError: Why some graph runs uncompiled, how many were compiled, and what to do.
    """
    if compiled.fallback:
        raise AssertionError(
            f"A graph runs uncompiled, expected none: {compiled.fallback}; {compiled.graphs} were compiled. "
            "Keep batch sizes equal, and switch everything on before the first step."
        )


class QuickSteps(_Trainer):
    """Mixin for a trainer: counts the model's parameters once a run, instead of in every step.

    ``Trainer`` asks ``floating_point_ops`` in each step, which counts the parameters by a walk over all
    modules, in Python, while the GPU waits: 10 ms for the 2,665 modules of Llama 3 8B with LoRA. Usage::

        class QuickTrainer(QuickSteps, SFTTrainer): ...

    With ``logging_nan_inf_filter=False`` the trainer does not wait for the backward pass either, so that its
    other walks (clipping and zeroing gradients) run while the GPU works.
    """

    _run: Any = None  # the state of the run that the count belongs to
    _flop_of_token = 0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """What ``Trainer`` returns, with the model's parameters counted once a run."""
        if self._run is not self.state:  # each call of train() begins a new one
            self._run, self._flop_of_token = self.state, 0
        name = getattr(self.model, "main_input_name", "input_ids")
        tokens = inputs[name].numel() if name in inputs else 0
        if not tokens:
            return 0
        if not self._flop_of_token:
            self._flop_of_token = super().floating_point_ops(inputs) // tokens
        return self._flop_of_token * tokens
