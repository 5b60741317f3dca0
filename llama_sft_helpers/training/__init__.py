"""Notebook 06: watch a run, prove what it changed, and find the way back after a lost session."""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "ThroughputCallback": "watching",  # tokens per second, peak memory and time left
    "LiveLossCallback": "watching",  # the losses, drawn while they come
    "plot_loss": "plots",  # training and held-out loss over the steps
    "plot_overfitting": "plots",  # both losses, the best step marked
    "peak_memory_gib": "watching",  # the peak so far, of the GPU or of this process
    "check_gradients_reach_adapters": "proofs",  # every A and B got a gradient
    "check_loss_history": "proofs",  # no logged loss is NaN, infinite or 0
    "LossError": "proofs",  # a loss shows that the training broke down
    "checksum_base": "core.bnb",  # a checksum of every frozen weight
    "check_base_unchanged": "core.bnb",  # the frozen weights are bit for bit what they were
    "describe_run": "checkpoints",  # the settings that a checkpoint belongs to
    "latest_checkpoint": "checkpoints",  # the newest whole checkpoint of the same run
    "check_checkpoint": "checkpoints",  # a checkpoint is whole
    "checkpoint_errors": "checkpoints",  # a full disk and the like, explained
    "RunGuardCallback": "checkpoints",  # seals each checkpoint and notes its run
    "CheckpointError": "checkpoints",  # a checkpoint is damaged or of another run
    "CheckpointWriteError": "checkpoints",  # a checkpoint could not be written
    "summarize_training_result": "findings",  # whether training lowered the held-out loss
    "summarize_advice": "advice",  # rate, rank and epochs by size of data, as a sweep found them
    "summarize_rates": "advice",  # what each rate of the sweep gave at one rank
    "write_training_summary": "summary",  # what this run says of itself, for 07
    "read_training_summary": "summary",  # the same, read and checked
    "hash_files": "core.files",  # SHA-256 of a folder's weights
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)
