"""The doctor's table: what each known failure looks like, why it happens and what to do; data only.

``doctor.explain`` goes through the table from top to bottom, so an entry stands above those that would match
it too. ``docs/failures.md`` is made from it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sign:
    """One look of a failure; whatever is given must hold.

    Attributes:
        raised: Bare class names, parted by ``|``; the exception is of one of them or of a subclass.
        message: Regular expression, searched in the message. Its named groups fill ``{...}`` in the texts.
        where: Regular expression, searched in the traceback's ``file:function`` lines.
        look: Name of a look at the surroundings (versions, profile, plan) in ``doctor``; it may decline.
    """

    raised: str = "Exception"
    message: str = ""
    where: str = ""
    look: str = ""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failure that is known: its signs, and the texts shown for it.

    Within a section the more telling failure stands first: it is taken even if the libraries hid it behind a
    later, vaguer one (transformers asks for a gated file again without the token, and reports only that).
    """

    key: str
    section: str
    title: str
    signs: tuple[Sign, ...]
    cause: str
    fix: str
    link: str


_HF = "https://huggingface.co"
_RESTART = "Restart the session (Colab: Runtime > Restart session; Jupyter: Kernel > Restart)"

TABLE: tuple[Failure, ...] = (
    # --- Packages ---
    Failure(
        "stale-import",
        "Packages",
        "A package was upgraded, but the session still runs the old one",
        (
            Sign("ImportError|AttributeError|TypeError|KeyError|ArrowException", look="stale_package"),
            Sign("ImportError", r"requires bitsandbytes", look="unseen_bitsandbytes"),
            Sign("ValueError", r"numpy\.dtype size changed", look="stale_numpy"),
        ),
        "Python keeps what it has imported: {package} {loaded} is in memory, {on_disk} is on the disk.",
        _RESTART + " and run the cells again from the top; no further install is needed.",
        "https://research.google.com/colaboratory/faq.html",
    ),
    Failure(
        "bitsandbytes-missing",
        "Packages",
        "bitsandbytes is not installed",
        (
            Sign("ImportError", r"No module named 'bitsandbytes'"),
            Sign("ImportError", r"requires (the latest version of )?bitsandbytes"),
            Sign("PackageNotFoundError", r"bitsandbytes"),
        ),
        "8-bit weights are computed by bitsandbytes, and this Python does not have it (Colab's image "
        "does not ship it).",
        "Run `pip install bitsandbytes`, then restart the session: transformers looks for it only once.",
        _HF + "/docs/bitsandbytes/main/en/installation",
    ),
    Failure(
        "bitsandbytes-native",
        "Packages",
        "bitsandbytes has no library for this machine's CUDA",
        (
            Sign("RuntimeError", r"Attempted to use bitsandbytes native library"),
            Sign("RuntimeError", r"SETUP ERROR: Missing dependency: (?P<library>\S+)"),
            Sign("RuntimeError", r"not available in CPU-only version of bitsandbytes"),
            Sign("OSError", r"libbitsandbytes\w*\.so"),
        ),
        "bitsandbytes was imported, but its compiled library could not be loaded: there is none for this "
        "PyTorch ({torch}), or the CUDA runtime that it needs is missing.",
        "Run `python -m bitsandbytes` to see which one is missing, unset BNB_CUDA_VERSION, run "
        "`pip install --force-reinstall --no-deps bitsandbytes` and restart the session.",
        _HF + "/docs/bitsandbytes/main/en/installation",
    ),
    Failure(
        "torchao-too-old",
        "Packages",
        "peft refuses the installed torchao",
        (Sign("ImportError", r"incompatible version of torchao\. Found version (?P<found>[\w.+]+)"),),
        "peft looks for torchao whenever it wraps a 16-bit or 32-bit Linear, and raises if it is older than "
        "0.16; here it is {found} (Colab's image ships 0.10.0). 8-bit layers do not meet this.",
        'Run `pip install --no-deps -U "torchao>=0.16"` (or uninstall torchao) and restart the session.',
        "https://github.com/unslothai/notebooks/pull/258",
    ),
    Failure(
        "renamed-argument",
        "Packages",
        "An argument was renamed or moved in a newer release",
        (
            Sign(
                "TypeError",
                r"(?P<owner>\w+)\.__init__\(\) got an unexpected keyword argument '(?P<old>\w+)'",
                look="renamed_argument",
            ),
        ),
        "`{owner}` of the installed version has no argument `{old}`; code written for an older one "
        "still passes it.",
        "{advice}",
        _HF + "/docs/trl/sft_trainer",
    ),
    Failure(
        "flash-attention-missing",
        "Packages",
        "FlashAttention was asked for and is not installed",
        (Sign("ImportError", r"FlashAttention\d? has been toggled on"),),
        "`attn_implementation` names the flash-attn package, which is not part of this series.",
        'Pass attn_implementation="sdpa" (PyTorch\'s own), or see notebook 08 for `varlen`.',
        _HF + "/docs/transformers/attention_interface",
    ),
    Failure(
        "widget-not-shown",
        "Packages",
        "The widget cannot be drawn",
        (
            Sign("ImportError", r"IProgress not found"),
            Sign("ImportError", r"No module named 'ipywidgets'"),
        ),
        "Progress bars and the login box are widgets, and ipywidgets is missing in the kernel's Python.",
        "Run `pip install ipywidgets`, restart the kernel and reload the page. If a widget then shows as "
        "plain text, the page lacks its half: `pip install jupyterlab_widgets`. Without widgets: set "
        "HF_TOKEN.",
        "https://ipywidgets.readthedocs.io/en/stable/user_install.html",
    ),
    # --- The hub ---
    Failure(
        "token-invalid",
        "The hub",
        "The hub does not accept the token",
        (
            Sign(
                "HfHubHTTPError|OSError", r"Invalid (credentials|user token|username or password)|is expired"
            ),
            Sign("AccessError", r"invalid-token"),
        ),
        "The token is mistyped, expired or revoked.",
        "Make a new one of type Read on https://huggingface.co/settings/tokens and log in again "
        "(notebook 02).",
        _HF + "/docs/hub/security-tokens",
    ),
    Failure(
        "token-scope",
        "The hub",
        "The fine-grained token may not read gated models",
        (
            Sign("HfHubHTTPError|OSError", r"fine-grained token"),
            Sign("AccessError", r"token-lacks-gated-permission"),
        ),
        "The account may be allowed, but this fine-grained token lacks the permission for gated models.",
        "Edit it on https://huggingface.co/settings/tokens: tick 'Read access to contents of all public "
        "gated repos you can access'; or use a token of type Read.",
        _HF + "/docs/hub/security-tokens",
    ),
    Failure(
        "gated-pending",
        "The hub",
        "The request for the gated model is not decided yet",
        (
            Sign("HfHubHTTPError|OSError", r"awaiting a review"),
            Sign("AccessError", r"gated-pending"),
        ),
        "The licence form was sent, and the model's authors have not answered.",
        "Wait for their mail (see https://huggingface.co/settings/gated-repos); until then use "
        "SFT_PROFILE=cpu-demo, an open model.",
        _HF + "/docs/hub/models-gated",
    ),
    Failure(
        "gated-rejected",
        "The hub",
        "The request for the gated model was refused",
        (
            Sign("HfHubHTTPError|OSError", r"has been rejected by the repo"),
            Sign("AccessError", r"gated-rejected"),
        ),
        "The authors of {repo} refused the request.",
        "The decision is theirs; use SFT_PROFILE=cpu-demo, an open model, or an open copy of Llama's shape.",
        _HF + "/docs/hub/models-gated",
    ),
    Failure(
        "gated-licence",
        "The hub",
        "The model is gated, and its licence is not accepted",
        (
            Sign("GatedRepoError|OSError", r"not in the authorized list"),
            Sign("AccessError", r"gated-not-accepted"),
        ),
        "The account behind the token has not accepted the licence of {repo}.",
        "Open {page} with the same account, fill in the form, wait for the mail, run the cell again.",
        _HF + "/docs/hub/models-gated",
    ),
    Failure(
        "token-missing",
        "The hub",
        "The model needs a token, and none was sent",
        (
            Sign("GatedRepoError|OSError", r"Access to \w+ \S+ is restricted\. You must have access"),
            Sign("LocalTokenNotFoundError|AccessError", r"Token is required|no-token"),
        ),
        "{repo} is gated, and the request carried no token.",
        "Log in with a token of type Read (notebook 02) after accepting the licence on {page}.",
        _HF + "/docs/hub/models-gated",
    ),
    Failure(
        "repository-not-found",
        "The hub",
        "The hub shows no such repository",
        (
            Sign("RepositoryNotFoundError"),
            Sign("OSError", r"is not a local folder and is not a valid model identifier"),
            Sign("AccessError", r"not-found"),
        ),
        "The name is misspelt, or the repository is private and the token's account may not see it.",
        "Check the name on {page}; for a private one log in with an account that may see it.",
        _HF + "/docs/huggingface_hub/guides/download",
    ),
    # --- Disk ---
    Failure(
        "disk-full",
        "Disk",
        "The disk is full",
        (
            Sign(
                message=r"No space left on device|File too large|Disk quota exceeded|os error (28|27|122)\b"
            ),
            Sign("CheckpointWriteError|FilesError", r"\bdisk\b.* (is|too) full"),
            Sign(
                "RuntimeError",
                r"(file write failed|unexpected pos \d+ vs \d+)",
                where=r"torch/serialization\.py",
            ),
        ),
        "A file could not be written to its end: there is no room left{place}.",
        "Free some: `hf cache ls` lists downloads (Llama 3 8B takes 16 GB) and `hf cache rm` removes one; "
        "old `checkpoint-*` folders can go but the newest. Or move: HF_HOME for downloads, SFT_OUTPUT_DIR "
        "for outputs. A half-written checkpoint is not used; the one before it is whole.",
        _HF + "/docs/huggingface_hub/guides/manage-cache",
    ),
    Failure(
        "folder-not-writable",
        "Disk",
        "The folder cannot be written",
        (
            Sign("PermissionError"),
            Sign("OSError", r"Read-only file system|os error (30|13)\b|PermissionError at"),
        ),
        "The system refuses to write{place}: the folder is read-only or belongs to someone else.",
        "Choose another: SFT_OUTPUT_DIR for outputs, SFT_MODELS_DIR for the demo model, HF_HOME for "
        "downloads.",
        _HF + "/docs/huggingface_hub/guides/manage-cache",
    ),
    # --- Network ---
    Failure(
        "download-interrupted",
        "Network",
        "A download stopped half-way",
        (
            Sign("OSError", r"Consistency check failed"),
            Sign(
                "RemoteProtocolError|IncompleteRead", r"without sending complete message body|IncompleteRead"
            ),
            Sign("RuntimeError|OSError", r"Data processing error|connection error when trying to load"),
            Sign("ReadTimeout|ReadError|ChunkedEncodingError", where=r"file_download\.py"),
        ),
        "The connection broke during the transfer. What arrived is kept; nothing is damaged.",
        "Run the cell again: it goes on where it stopped. If it breaks every time: "
        "HF_HUB_DOWNLOAD_TIMEOUT=60, HF_HUB_DISABLE_XET=1, and check HF_ENDPOINT and proxies.",
        _HF + "/docs/huggingface_hub/guides/download",
    ),
    Failure(
        "hub-unreachable",
        "Network",
        "The hub cannot be reached",
        (
            Sign("OSError", r"couldn't connect to '(?P<endpoint>[^']+)'"),
            Sign("LocalEntryNotFoundError|OfflineModeIsEnabled"),
            Sign("ConnectionError", r"Couldn't reach '(?P<name>[^']+)' on the Hub"),
            Sign("ConnectError|ConnectTimeout|PoolTimeout|ProxyError|NetworkError"),
            Sign("HfHubHTTPError|HTTPStatusError", r"\b50[0234]\b"),
            Sign("AccessError", r"hub-unreachable"),
        ),
        "No usable answer came from the hub, and the files are not in the cache.",
        "Check the network and https://status.huggingface.co, unset HF_HUB_OFFLINE, check HF_ENDPOINT and "
        "proxies, run the cell again. Without a network: SFT_PROFILE=cpu-demo downloads nothing.",
        _HF + "/docs/transformers/installation#offline-mode",
    ),
    # --- Graphics card ---
    Failure(
        "cuda-out-of-memory",
        "Graphics card",
        "The graphics card's memory is full",
        (
            Sign("OutOfMemoryError", r"Tried to allocate (?P<wanted>[\d.]+ \w+)", look="memory_plan"),
            Sign(
                "OutOfMemoryError|RuntimeError",
                r"CUDA out of memory|CUDA error: out of memory",
                look="memory_plan",
            ),
            Sign("RuntimeError", r"CUBLAS_STATUS_ALLOC_FAILED", look="memory_plan"),
        ),
        "The step asked for {wanted} more than the card has left. {plan}",
        "{change} Then restart the session: a failed cell keeps its tensors.",
        "https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management",
    ),
    Failure(
        "device-side-assert",
        "Graphics card",
        "A kernel on the card stopped at an assertion",
        (
            Sign("AcceleratorError|RuntimeError", r"device-side assert triggered"),
            Sign("RuntimeError", r"CUDA error: an illegal memory access"),
        ),
        "Nearly always a token id that the embedding has no row for, or a label outside the vocabulary "
        "(-100 excepted). CUDA reports it late, so the line above is not the place, and the session's "
        "CUDA state is lost.",
        _RESTART + ", check int(input_ids.max()) < model.config.vocab_size, and run one batch on the CPU, "
        "where the message names the place.",
        "https://docs.pytorch.org/docs/stable/notes/cuda.html#asynchronous-execution",
    ),
    Failure(
        "no-gpu",
        "Graphics card",
        "There is no GPU to use",
        (
            Sign("RuntimeError", r"Cannot access accelerator device when none is available"),
            Sign("AssertionError", r"Torch not compiled with CUDA enabled"),
            Sign("RuntimeError", r"Found no NVIDIA driver|No CUDA GPUs are available"),
            Sign("ValueError", r"doesn't support bf16/gpu"),
        ),
        "The code asks for a GPU, and PyTorch ({torch}) finds none.",
        "Colab: Runtime > Change runtime type > GPU. On a laptop: SFT_PROFILE=cpu-demo and "
        "device_map=profiles.device_map().",
        "https://research.google.com/colaboratory/faq.html",
    ),
    # --- Precision ---
    Failure(
        "grad-scaler-bf16",
        "Precision",
        "The fp16 loss scaler met bfloat16 gradients",
        (
            Sign(
                "NotImplementedError|RuntimeError", r"_amp_foreach_non_finite_check_and_unscale_\w+.*BFloat16"
            ),
        ),
        "fp16=True scales the loss, and the scaler has no kernel for bfloat16; trl casts LoRA weights to "
        "bfloat16 on an 8-bit or 4-bit base.",
        "Right after building the trainer: "
        "`for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data`; "
        "or use bf16=True on Ampere and later.",
        "https://github.com/huggingface/trl/issues/4901",
    ),
    Failure(
        "fp16-unscale",
        "Precision",
        "The weights that are trained are fp16 themselves",
        (Sign("ValueError", r"Attempting to unscale FP16 gradients"),),
        "With fp16=True the trainer keeps float32 weights and computes in fp16; here the trainable weights "
        "are fp16, and their gradients cannot be unscaled safely.",
        "Right after get_peft_model: "
        "`for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data`.",
        _HF + "/docs/peft/developer_guides/troubleshooting",
    ),
    Failure(
        "cast-of-8-bit-model",
        "Precision",
        "An 8-bit model cannot be cast",
        (Sign("ValueError", r"cannot cast a bitsandbytes model|is not supported for (quantized|`8-bit`)"),),
        "The int8 codes mean nothing in another dtype, so transformers refuses `.to(dtype)` and `.half()`.",
        "Name the dtype of the other layers when loading: from_pretrained(..., dtype=torch.bfloat16).",
        _HF + "/docs/transformers/quantization/bitsandbytes",
    ),
    # --- Training ---
    Failure(
        "quantized-not-trainable",
        "Training",
        "A quantized model without adapters cannot be trained",
        (Sign("ValueError", r"fine-tuning on purely quantized models"),),
        "int8 weights have no useful gradient; something 16-bit or 32-bit must be trained on top of them.",
        "Call get_peft_model(model, LoraConfig(...)), or pass peft_config=LoraConfig(...) to SFTTrainer.",
        _HF + "/docs/transformers/peft",
    ),
    Failure(
        "no-gradient",
        "Training",
        "No weight receives a gradient",
        (
            Sign("RuntimeError", r"does not require grad and does not have a grad_fn"),
            Sign("AssertionError", r"LoRA matrices without a finite, non-zero gradient"),
        ),
        "Everything that the loss depends on is frozen: an adapter loaded for inference, or reentrant "
        "checkpointing over a frozen embedding.",
        "PeftModel.from_pretrained(base, folder, is_trainable=True); with checkpointing "
        'gradient_checkpointing_kwargs={"use_reentrant": False}. training.check_gradients_reach_adapters '
        "lists what is cut off.",
        _HF + "/docs/peft/developer_guides/checkpoint",
    ),
    Failure(
        "no-trained-token",
        "Training",
        "No row has a token left to train on",
        (Sign("ValueError", r"num_samples should be a positive integer value, but got num_samples=0"),),
        "Every completion lies behind max_length, so trl dropped all rows (or the data set was empty).",
        "Raise max_length (05 shows the lengths), or shorten the prompts; data.check_rows names the rows.",
        _HF + "/docs/trl/sft_trainer",
    ),
    Failure(
        "loss-nan-or-zero",
        "Training",
        "The loss is NaN, or exactly 0",
        (
            Sign("LossError"),
            Sign("RuntimeError", r"probability tensor contains either `?inf`?, `?nan`?"),
            Sign("RuntimeError", r"Function '(?P<function>\w+)' returned nan values"),
        ),
        "A number overflowed: fp16 beyond 65,504, a learning rate far too high, or weights that were NaN "
        "when loaded. The trainer writes a NaN loss as 0 (logging_nan_inf_filter), so a loss of "
        "exactly 0 is one.",
        "Use bf16=True where the card has it; on a T4 fp16=True with float32 LoRA weights; a learning rate "
        "near 2e-4; max_grad_norm=1.0. Go on from a checkpoint before the first bad step.",
        _HF + "/docs/transformers/main_classes/trainer#transformers.TrainingArguments.logging_nan_inf_filter",
    ),
    # --- Tokenizer and data ---
    Failure(
        "pad-token-missing",
        "Tokenizer and data",
        "There is no padding token",
        (
            Sign("ValueError", r"tokenizer does not have a padding token|no padding token"),
            Sign("ValueError", r"specified `pad_token` \('(?P<pad>[^']*)'\) is not found"),
            Sign("ValueError", r"Cannot handle batch sizes > 1 if no padding token"),
        ),
        "Rows of one batch need one length, and Llama 3's tokenizer brings no token to fill them with.",
        "Set tokenizer.pad_token = choose_pad_token(tokenizer) (notebook 05): an unused special token, "
        "never EOS.",
        _HF + "/docs/transformers/pad_truncation",
    ),
    Failure(
        "resume-with-other-settings",
        "Tokenizer and data",
        "The checkpoint was written with other settings",
        (
            Sign("RuntimeError", r"size mismatch for", where=r"trainer\.py:_load_from_checkpoint"),
            Sign("ValueError", r"parameter group that doesn't match the size of optimizer's group"),
            Sign("ValueError", r"different number of parameter groups"),
            Sign("KeyError", where=r"optim\w*(/\w+)?\.py:(step|_get_options|load_state_dict)"),
            Sign("CheckpointError", r"belong to another run"),
        ),
        "Resuming needs the LoRA rank, the target modules and the optimizer that the checkpoint was "
        "written with; these differ.",
        "Set them back to the checkpoint's adapter_config.json, or start anew: another output folder, and "
        "resume_from_checkpoint=None.",
        _HF + "/docs/transformers/trainer#checkpoints",
    ),
    Failure(
        "embedding-size-mismatch",
        "Tokenizer and data",
        "Tokenizer, embedding and saved weights differ in size",
        (
            Sign("RuntimeError", r"size mismatch for \S*(embed_tokens|lm_head)"),
            Sign("RuntimeError", r"ignore_mismatched_sizes"),
        ),
        "The saved embedding has another number of rows than the model here: tokens were added on one side, "
        "or the adapter belongs to another base.",
        "Load tokenizer and model from one folder, and add no tokens (choose_pad_token needs none); "
        "an adapter trained with added tokens needs model.resize_token_embeddings(len(tokenizer)) first.",
        _HF + "/docs/peft/developer_guides/troubleshooting",
    ),
    Failure(
        "adapter-of-another-base",
        "Tokenizer and data",
        "The adapter was trained on another base model",
        (
            Sign("RuntimeError", r"size mismatch for \S*lora_"),
            Sign("ValueError", r"Target modules .* not found in the base model|No modules were targeted"),
        ),
        "The names or shapes of the adapter's target modules do not fit this model's layers.",
        "Load the base that adapter_config.json names (base_model_name_or_path), then the adapter.",
        _HF + "/docs/peft/developer_guides/checkpoint",
    ),
    Failure(
        "token-id-out-of-range",
        "Tokenizer and data",
        "A token id or label lies outside the vocabulary",
        (
            Sign("IndexError", r"index out of range in self", where=r"functional\.py:embedding"),
            Sign(
                "IndexError",
                r"Target (?P<target>-?\d+) is out of bounds",
                where=r"functional\.py:cross_entropy",
            ),
        ),
        "The tokenizer gives ids that the model's embedding has no row for: it belongs to another model, or "
        "tokens were added to it. (On a GPU the same is a device-side assert.)",
        "Load tokenizer and model from the same folder; check len(tokenizer) <= model.config.vocab_size.",
        _HF + "/docs/transformers/main_classes/tokenizer",
    ),
    Failure(
        "dataset-columns",
        "Tokenizer and data",
        "The data set lacks the columns that the trainer reads",
        (Sign("KeyError", r"^'?(text|prompt|completion|messages)'?$", where=r"sft_trainer\.py"),),
        "SFTTrainer reads `prompt` and `completion` (or `text`, or `messages`), and the rows have no "
        "such column.",
        "Run dataset.map(to_prompt_completion, remove_columns=dataset.column_names) first (notebook 05).",
        _HF + "/docs/trl/dataset_formats",
    ),
    # --- Files ---
    Failure(
        "truncated-file",
        "Files",
        "A weights or checkpoint file is cut off or damaged",
        (
            Sign(
                "SafetensorError",
                r"deserializing header|incomplete metadata|InvalidHeader|MetadataIncomplete",
            ),
            Sign("RuntimeError", r"PytorchStreamReader failed"),
            Sign("OSError|EOFError|UnpicklingError", where=r"torch/serialization\.py:load"),
            Sign("JSONDecodeError", where=r"trainer_callback\.py:load_from_json"),
            Sign("CheckpointError", r"is cut short or damaged|checkpoint is incomplete"),
        ),
        "The file ends before its own header says it should: writing or downloading it was interrupted.",
        "Checkpoint: resume from the one before (training.latest_checkpoint skips broken ones). Download: "
        "delete the file and run the cell again, or pass force_download=True.",
        _HF + "/docs/safetensors",
    ),
    Failure(
        "merge-into-8-bit",
        "Files",
        "Merging into 8-bit weights loses the adapter",
        (Sign("Warning", r"Merge lora module to (?P<bits>[48])-bit linear"),),
        "LoRA's change is smaller than one step of the int8 grid, so rounding removes nearly all of it.",
        "Load a fresh base in bfloat16 without quantization_config, put the adapter on it, and call "
        "merge_and_unload() there (notebook 07).",
        "https://github.com/huggingface/peft/issues/2321",
    ),
    # --- Memory and kernel ---
    Failure(
        "system-memory",
        "Memory and kernel",
        "The machine's own memory is full",
        (
            Sign("RuntimeError", r"DefaultCPUAllocator: can't allocate memory"),
            Sign("MemoryError"),
            Sign("OSError", r"Cannot allocate memory"),
        ),
        "Not the graphics card: the computer's RAM could not hold what was asked for.",
        'Load with dtype=torch.bfloat16 and device_map={"": 0}, so that weights go to the card one by one; '
        "close other notebooks; Colab: Runtime > Change runtime type > High-RAM.",
        _HF + "/docs/transformers/models#big-model-inference",
    ),
    Failure(
        "kernel-died",
        "Memory and kernel",
        "The kernel died",
        (Sign("DeadKernelError|RunError", r"(?i)kernel died"),),
        "The process was killed from outside, in most cases by the system because RAM was full.",
        'A smaller profile (SFT_PROFILE=cpu-demo), device_map={"": 0} so that weights do not stay in RAM, or '
        "High-RAM in Colab. 06 resumes from its last checkpoint.",
        "https://research.google.com/colaboratory/faq.html",
    ),
)

# Old argument -> what the tested versions take instead.
RENAMED_ARGUMENTS: dict[str, str] = {
    "tokenizer": "SFTTrainer(processing_class=...)",
    "max_seq_length": "SFTConfig(max_length=...)",
    "dataset_text_field": "SFTConfig(dataset_text_field=...)",
    "dataset_num_proc": "SFTConfig(dataset_num_proc=...)",
    "packing": "SFTConfig(packing=...)",
    "neftune_noise_alpha": "SFTConfig(neftune_noise_alpha=...)",
    "evaluation_strategy": "SFTConfig(eval_strategy=...)",
    "per_gpu_train_batch_size": "SFTConfig(per_device_train_batch_size=...)",
    "per_gpu_eval_batch_size": "SFTConfig(per_device_eval_batch_size=...)",
    "group_by_length": "SFTConfig(train_sampling_strategy=...), with the value 'group_by_length'",
    "push_to_hub_token": "SFTConfig(hub_token=...)",
    "warmup_ratio": "SFTConfig(warmup_steps=...), where a value below 1 is a share of all steps",
    "no_cuda": "SFTConfig(use_cpu=...)",
    "load_in_8bit": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    "logging_dir": "nothing here: set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "nothing: safetensors is the only format",
    "overwrite_output_dir": "nothing: choose another output_dir, or resume",
    "use_mps_device": "nothing: the device is found by itself",
}
