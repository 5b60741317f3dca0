"""The Modelfile, and what llama.cpp is asked by it; llama.cpp itself is benchmarks/gguf_answers.py's."""

import sys
from types import SimpleNamespace

import pytest

from llama_sft_helpers.evaluation import write_modelfile
from llama_sft_helpers.evaluation.serving import ask

PROMPT = 'Say "it" in\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n'


def write(folder, prompt=PROMPT, **options):
    options |= {"model_file": "m.gguf", "stop": "<|im_end|>", "max_new_tokens": 48}
    return write_modelfile(folder / "Modelfile", prompt=prompt, **options)


def test_a_modelfile_is_as_ollama_documents_it(tmp_path):
    assert write(tmp_path, adapter_file="a.gguf").read_text(encoding="utf-8") == (
        f'FROM ./m.gguf\nADAPTER ./a.gguf\nTEMPLATE """{PROMPT}"""\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_predict 48\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    )


@pytest.mark.parametrize("prompt", ["no place", '{{ .Prompt }} """'])
def test_a_prompt_that_cannot_be_a_template_is_refused(tmp_path, prompt):
    with pytest.raises(ValueError, match=r"expected \{\{ .Prompt \}\} once"):
        write(tmp_path, prompt)


class Server:
    """llama.cpp's server: keeps what it is given, and says the same to everything."""

    def __init__(self, params):
        self.params, self.asked = params, []
        Server.last = self

    def handle_completions(self, request):
        self.asked.append(request)
        choice = {"text": "hi", "finish_reason": "stop", "logprobs": {"content": [{"id": 7}, {"id": 2}]}}
        return {"choices": [choice]}


@pytest.fixture
def llama_cpp(monkeypatch):
    parts = ("model", "cpuparams", "cpuparams_batch")
    fake = SimpleNamespace(
        CommonParams=lambda: SimpleNamespace(**{part: SimpleNamespace() for part in parts}),
        CommonAdapterLoraInfo=SimpleNamespace,
        Server=Server,
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)


def test_llama_cpp_gets_the_template_the_stop_and_the_adapter(tmp_path, llama_cpp):
    answers = ask(write(tmp_path, adapter_file="a.gguf"), ["one", "two"])
    assert answers == [{"text": "hi", "tokens": [7, 2], "stopped": True}] * 2
    first, second = Server.last.asked
    assert [first["prompt"], second["prompt"]] == [PROMPT.replace("{{ .Prompt }}", n) for n in ("one", "two")]
    assert (first["stop"], first["max_tokens"], first["temperature"]) == (["<|im_end|>"], 48, 0)
    given = Server.last.params
    assert given.cpuparams.n_threads == 3
    assert given.model.path == str(tmp_path / "./m.gguf")
    assert given.lora_adapters[0].path == str(tmp_path / "./a.gguf")


def test_without_an_adapter_none_is_given_and_an_incomplete_modelfile_is_refused(tmp_path, llama_cpp):
    ask(write(tmp_path), [])
    assert not hasattr(Server.last.params, "lora_adapters")
    (tmp_path / "Modelfile").write_text("FROM ./m.gguf\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is not as write_modelfile writes it"):
        ask(tmp_path / "Modelfile", [])
