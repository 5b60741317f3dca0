"""Notebook 03: what 8-bit quantization does to the weights, the bytes and the predictions."""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "summarize_layers": "tables",  # parameters and bytes by layer class and storage type
    "summarize_forward_memory": "tables",  # GPU memory that a forward pass needs beside the weights
    "render_side_by_side": "tables",  # two models' trees, the changed layers marked
    "summarize_quantization_error": "tables",  # how far each weight matrix moved
    "summarize_outliers": "tables",  # the columns that LLM.int8() keeps in 16 bits
    "summarize_predictions": "tables",  # loss and first choices on a batch
    "quantize_absmax": "layers",  # a matrix as int8 codes and a scale for each row
    "summarize_memory": "layers",  # a model's bytes in five formats, from its configuration
    "plot_weight_grid": "plots",  # one row's weights on the int8 grid
    "plot_rounding": "plots",  # some weights and the levels they go to, for any number of bits
    "plot_quantization_error": "plots",  # the error of each matrix over the depth
    "plot_int8_product": "plots",  # one output worked out in int8
    "plot_outliers": "plots",  # where the outlier columns are
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)
