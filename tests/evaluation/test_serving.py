"""The Modelfile, and what llama.cpp is asked by it; llama.cpp itself is benchmarks/gguf_answers.py's."""

import sys
from types import SimpleNamespace

import pytest

from llama_sft_helpers.evaluation import write_modelfile
from llama_sft_helpers.evaluation.serving import ask, read_modelfile

PROMPT = 'Say "it" in\n### Instruction:\n{{ .Prompt }}\n\n### Response:\n'


def write(folder, prompt=PROMPT, **options):
    return write_modelfile(
        folder / "Modelfile",
        model_file="m.gguf",
        prompt=prompt,
        stop="<|im_end|>",
        max_new_tokens=48,
        **options,
    )


def test_a_modelfile_is_as_ollama_documents_it(tmp_path):
    text = write(tmp_path, adapter_file="a.gguf").read_text(encoding="utf-8")
    assert text == (
        f'FROM ./m.gguf\nADAPTER ./a.gguf\nTEMPLATE """{PROMPT}"""\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_predict 48\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    )
    assert read_modelfile(tmp_path / "Modelfile")["template"] == PROMPT
    assert "ADAPTER" not in write(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", ["no place", '{{ .Prompt }} """'])
def test_a_prompt_that_cannot_be_a_template_is_refused(tmp_path, prompt):
    with pytest.raises(ValueError, match=r"expected \{\{ .Prompt \}\} once"):
        write(tmp_path, prompt)


def test_an_incomplete_modelfile_is_refused(tmp_path):
    (tmp_path / "Modelfile").write_text("FROM ./m.gguf\n")
    with pytest.raises(ValueError, match="lacks template, stop, num_predict"):
        read_modelfile(tmp_path / "Modelfile")


def test_llama_cpp_gets_the_template_the_stop_and_the_adapter(tmp_path, monkeypatch):
    asked, given = [], []

    class Server:
        def __init__(self, params):
            given.append(params)

        def handle_completions(self, request):
            asked.append(request)
            content = [{"id": 7}, {"id": 2}]
            choice = {"text": "hi", "finish_reason": "stop", "logprobs": {"content": content}}
            return {"choices": [choice]}

    fake = SimpleNamespace(
        CommonParams=lambda: SimpleNamespace(
            model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
        ),
        CommonAdapterLoraInfo=SimpleNamespace,
        Server=Server,
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)
    answers = ask(write(tmp_path, adapter_file="a.gguf"), ["one", "two"])
    assert answers == [{"text": "hi", "tokens": [7, 2], "stopped": True}] * 2
    assert [request["prompt"] for request in asked] == [
        PROMPT.replace("{{ .Prompt }}", n) for n in ("one", "two")
    ]
    assert (asked[0]["stop"], asked[0]["max_tokens"], asked[0]["temperature"]) == (["<|im_end|>"], 48, 0)
    assert given[0].cpuparams.n_threads == 3
    assert given[0].model.path == str(tmp_path / "./m.gguf")
    assert given[0].lora_adapters[0].path == str(tmp_path / "./a.gguf")
