"""Notebook 04: what LoRA adds to a model, what it leaves alone, and what its settings cost and bring."""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "plan_adapters": "tables",  # A, B and the trainable parameters, from a configuration
    "summarize_adapters": "tables",  # A and B of a wrapped model, by projection
    "summarize_gradients": "tables",  # which of A and B got a gradient
    "summarize_frozen": "tables",  # what does not train
    "summarize_training_state": "tables",  # bytes of weights, gradients and the optimizer's means
    "check_adapter_is_noop": "tables",  # B = 0 leaves the logits as they are
    "AdapterNotNoopError": "tables",  # raised where it does not
    "summarize_update": "tables",  # size and rank of the trained update
    "plot_update_spectrum": "tables",  # its singular values
    "plot_detour": "plots",  # W beside B and A
    "plan_sweep": "sweep",  # choose ranks, rates and targets for a budget of time
    "plot_sweep": "sweep",  # held-out loss over parameters
    "summarize_claims": "sweep",  # whether QLoRA's claims show in a sweep
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)
