"""Notebook 08: int8 training at 16-bit speed, the switches for a model and what a ladder of runs measured.

The switches are the only functions of the package that change a model. Each keeps the weights, the
``state_dict`` and what the model computes, up to rounding, and each can be undone.
"""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "use_fast_int8": "int8_product",  # switch: int8 weights in a 16-bit product
    "use_int8_units": "int8_units",  # switch: int8 inputs too, on the GPU's int8 units
    "use_cpu_kernels": "cpu_kernels",  # switch: int8 layers on a CPU, the same to the bit
    "score_labels_only": "cpu_kernels",  # switch: trl's loss on a CPU, without logits that have no label
    "use_grouped_attention": "grouped_attention",  # switch: generation on a CPU without copies of keys
    "register_varlen_attention": "varlen",  # switch: attention that skips what packing masks
    "document_bounds": "core.batches",  # where the packed rows begin and end
    "compile_decoder_layers": "compiled_layers",  # switch: each decoder layer compiled
    "CompiledLayers": "compiled_layers",  # what was compiled, and how to undo it
    "check_graphs": "compiled_layers",  # few graphs were compiled
    "QuickSteps": "compiled_layers",  # a trainer's mixin: what each step recomputes, once
    "row_losses": "losses",  # the loss of each row of a padded or packed batch
    "rounding_bound": "losses",  # by how much rounding may move it
    "read_results": "ladder",  # what a benchmark measured and the project keeps
    "summarize_ladder": "ladder",  # one row for each rung
    "plot_ladder": "ladder",  # bars of one column
    "plot_int8_units": "picture",  # the two ways through a frozen int8 layer
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)
