"""Notebook 05: rows, tokens, labels, lengths and packing, seen as the model gets them."""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "choose_pad_token": "tokens",  # a pad token that is not EOS
    "summarize_tokenizer": "tokens",  # the special tokens and what they are for
    "summarize_tokens": "tokens",  # texts and the number of their tokens
    "render_tokens": "tokens",  # texts with their tokens striped
    "check_boundary": "tokens",  # prompt and completion split at the same token, together and apart
    "summarize_loss_mask": "tokens",  # how many tokens of a batch the loss scores
    "render_loss_mask": "tokens",  # a row with its scored tokens coloured
    "check_eos_is_trained": "tokens",  # every row is scored on the EOS that ends it
    "to_prompt_completion": "rows",  # a row of any known layout as prompt and completion
    "summarize_rows": "checks",  # what is wrong with rows, and how often
    "check_rows": "checks",  # no row is unusable
    "load_rows": "sources",  # a file, a folder or a hub name as rows, and which layout they have
    "check_file": "sources",  # a data file can be read; else its line and the fix
    "choose_prompt_format": "formats",  # Alpaca's template, the model's own, or none, and why
    "format_rows": "formats",  # rows as SFTTrainer takes them
    "to_messages": "formats",  # a row of any layout as chat turns
    "render_prompt": "formats",  # what a model is given to answer
    "training_template": "formats",  # the template that goes with the tokenizer
    "count_row_tokens": "formats",  # tokens of each formatted row
    "sort_by_length": "formats",  # held-out rows from the shortest on, so that batches are padded little
    "count_tokens": "rows",  # tokens of each row, EOS counted
    "DataError": "rows",  # rows or a file cannot be trained on
    "summarize_lengths": "packing",  # what each max_length cuts off
    "plot_lengths": "packing",  # histogram of row lengths
    "plan_packing": "packing",  # tokens and padding of three ways to fill a batch, from lengths
    "summarize_packing": "packing",  # the same, counted in real batches
    "plot_packing": "packing",  # packed blocks and the rows in them
    "plot_packing_mask": "packing",  # which tokens of a block each token sees
    "summarize_isolation": "packing",  # packed losses beside those of each row alone
    "check_isolation": "packing",  # no packed row sees its neighbours
    "TokenError": "packing",  # tokens, labels or losses are not what training needs
    "plan_split": "splits",  # how many rows train and how many are held out
    "plan_steps": "splits",  # how many updates, and how often they see each row
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)
