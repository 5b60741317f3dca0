"""Fixtures shared by the tests: the environment of the small models, and the tiny Llama itself."""

import copy
import gc
import os
from pathlib import Path

import pytest

pytest_plugins = ["adapter_fixture", "ledger"]  # fixtures of their own modules
ROOT = Path(__file__).parent.parent
# Set at import, so that notebook kernels and subprocesses inherit it too. Models are kept between runs.
os.environ["SFT_PROFILE"] = "ci-tiny"
os.environ["SFT_LANG"] = "en"  # whatever the language of the developer's system is
os.environ.setdefault("SFT_MODELS_DIR", str(ROOT / ".cache" / "models"))
# huggingface_hub reads its variables once, when it is imported: what the developer's shell says of offline
# mode, token, endpoint or caches must not reach the tests.
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[_name]
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch.compile's cache of C++ code does not ask which instruction set it was made for, and code for AVX2 does
# not compile where ATEN_CPU_CAPABILITY says `default`: each limit gets a cache of its own.
if _limit := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / f"inductor-{_limit}"))
# Before its first graph torch.compile tries by compiling whether the compiler knows the CPU's vectors, and
# starts a process that compiles beside others: ten seconds that tests of a graph or two can do without.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Kernels and programs that tests start do not look for garbage, nor do xdist's workers, which are programs as
# well; tests in one process do so less often. Imports take a fifth less time.
_on_path = [str(ROOT / "tests" / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(_on_path)
gc.set_threshold(50_000)
# Processes that share the cores share them out: threads that wait for threads without a core wait very long.
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    from llama_sft_helpers.run import cores

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // _workers)))


def pytest_xdist_auto_num_workers():
    """One more than cores, as many tests wait: for a kernel to start or end, or for a limit of time."""
    from llama_sft_helpers.run import cores

    return cores() + 1


# Files that start kernels and processes, the longest first: what takes long must not be what is begun last.
LONG = ("notebooks", "your_run", "colab_journeys", "small_data", "speed", "doctor", "run", "resume")
LONG = tuple(f"test_{name}" for name in LONG)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest; ``--no-loadscope-reorder`` keeps xdist from sorting again."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The tiny Llama as a Hugging Face folder."""
    from llama_sft_helpers.demo_model import ensure_model

    return ensure_model("tiny-llama")


@pytest.fixture
def tiny_tokenizer(tiny_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def built_smollm2_tokenizer():
    from llama_sft_helpers import demo_model

    return demo_model._smollm2_tokenizer(demo_model._smollm2_gguf())


@pytest.fixture(scope="module")
def smollm2_tokenizer(built_smollm2_tokenizer):
    """The demo model's tokenizer, which takes seconds to build: a copy for each file."""
    return copy.deepcopy(built_smollm2_tokenizer)


@pytest.fixture
def tiny_model(tiny_model_dir):
    """The tiny Llama in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture
def tiny_model_int8(tiny_model_dir):
    """The tiny Llama with 8-bit weights, on the CPU."""
    from tiny_models import load_int8

    return load_int8(tiny_model_dir)


@pytest.fixture
def write_notebooks(tmp_path, tiny_model_dir):
    """Writes notebooks of these cells, ``n01_first=["1 + 1"]``, and returns their folder."""
    import nbformat

    def write(**sources_by_name):
        folder = tmp_path / "originals"
        folder.mkdir(exist_ok=True)
        for name, sources in sources_by_name.items():
            cells = [nbformat.v4.new_code_cell(source) for source in sources]
            nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name[1:]}.ipynb")
        return folder

    return write
