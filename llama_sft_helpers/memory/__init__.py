"""What a training step needs of the memory, planned before it is spent (notebooks 01 and 06)."""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "plan_memory": "plan",  # the memory of a step, component by component
    "planned_peak_gib": "plan",  # what PyTorch will count as allocated
    "plan_fit": "plan",  # does it fit a card, and what would make it fit
    "reconcile_memory": "plan",  # planned beside measured
    "plot_memory": "plan",  # the plan as bars
    "plot_fit": "plan",  # the plan added up, beside a card
    "CARDS_GIB": "plan",  # what PyTorch can use of the cards that are sold
    "smaller_profiles": "plan",  # changes that need less, the mildest first
    "plan_smaller_batch": "plan",  # the next smaller micro-batch of the same effective batch
    "explain_oom": "plan",  # what filled the card, and the next try
    "check_supported": "core.llama",  # refuse a model whose layers are not Llama's
    "UnsupportedModelError": "core.llama",  # raised where it is refused
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)
