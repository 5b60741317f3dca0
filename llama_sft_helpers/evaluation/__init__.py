"""Notebook 07: did it learn, does it stop, does the merged model still say the same, and publishing it."""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "encode_rows": "losses",  # token ids and labels, as SFTTrainer makes them
    "summarize_row_losses": "losses",  # loss and probability of EOS of each row
    "summarize_perplexity": "losses",  # held-out loss and perplexity with bootstrap intervals
    "next_token_log_probs": "losses",  # log-probabilities of the scored tokens
    "EvaluationError": "losses",  # a measured value is not the expected one
    "summarize_generations": "answers",  # answers side by side
    "render_generations": "answers",  # the same as a page
    "summarize_stops": "answers",  # whether answers end
    "plot_stops": "answers",  # the probability of EOS where the reference ends
    "summarize_verdict": "findings",  # what was measured, in words, with uncertainty and advice
    "read_tasks": "tasks",  # small tasks whose answers a program can check
    "score_tasks": "tasks",  # a model's answers to them, checked
    "summarize_tasks": "tasks",  # right before and after, with intervals
    "measure_forgetting": "forgetting",  # loss on plain text and KL to the base model
    "find_base_model": "adapter",  # the base model that an adapter names
    "name_base_model": "adapter",  # let it name a demo model, not this machine's folder
    "check_adapter": "adapter",  # an adapter folder belongs to this base model
    "check_adapter_loaded": "adapter",  # the model holds what the file holds
    "AdapterError": "adapter",  # the adapter is missing, damaged or another's
    "merge_device_map": "merging",  # where a merge has room
    "summarize_int8_merge": "merging",  # what merging into int8 would keep
    "summarize_merge_fidelity": "merging",  # how far the merged model's predictions are
    "check_merge_fidelity": "merging",  # merging kept what the adapter does
    "MergeError": "merging",  # there is no room or no base to merge
    "write_merged_shards": "shards",  # merge file by file, where the model does not fit
    "check_merged_shards": "shards",  # each merged weight is PEFT's own
    "write_model_card": "publishing",  # the model card
    "keep_model_card": "publishing",  # as it was, while PEFT saves an adapter beside it
    "write_modelfile": "serving",  # Ollama's file: model, training's prompt, where an answer ends
    "hash_rows": "publishing",  # SHA-256 of the data, for the card
    "check_repo_id": "publishing",  # a name that the hub and the licence allow
    "hub_errors": "publishing",  # the hub's refusals explained
    "PublishError": "publishing",  # it cannot be published, or the hub refused it
    "new_folder": "core.files",  # a folder written whole or not at all
    "stream_answer": "chat",  # an answer, piece by piece
    "chat_box": "chat",  # a box to talk to the model in a notebook
    "run_chat": "chat",  # the same in a terminal
    "ChatError": "chat",  # the model cannot answer
    "write_engine_configs": "engines",  # the same run for several GPUs, with TRL and Accelerate
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)
