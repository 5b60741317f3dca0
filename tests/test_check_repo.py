"""Each rule of ``tools/check_repo.py`` on a small tree that breaks it, and on this repository."""

import json
import re
from pathlib import Path

import check_notebooks
import check_package
import check_repo
import nbformat
import pytest
import translation
from repository import Repository

ROOT = Path(__file__).parent.parent
PACKAGE = "llama_sft_helpers"
LORA = f"{PACKAGE}/lora/__init__.py"
ROWS = f"{PACKAGE}/datasets/alpaca_mini.jsonl"
RESULT = "benchmarks/results/x.json"
TABLE = 'CONTENTS = {\n    "f": "tables",  # draws a figure of it\n}'
FIGURE = nbformat.v4.new_output("display_data", {"image/png": "iVBOR"}, metadata={"image/png": {"alt": "x"}})
PYTHONS = """[project]
requires-python = ">=3.11,<3.13"
classifiers = ["Programming Language :: Python :: 3.11", "Typing :: Typed"]"""
EXTRAS = {
    "requirements-run.txt": "PyYAML>=2",
    "requirements-test.txt": "pytest",
    "pyproject.toml": "[tool.setuptools.dynamic.optional-dependencies]\n"
    + "".join(
        f'{extra} = {{ file = ["requirements-{file}.txt"] }}\n'
        for extra, file in {"colab": "run", "run": "run", "test": "test"}.items()
    ),
}
KOREAN = "translations/ko/01_a.md"
GLOSSARY = '[[term]]\nenglish = "loss"\nkorean = "손실"\nforbidden = ["로스"]'
MINUTES = "| [1](x/01_a.ipynb)<sub>CPU demo: 3 min · 8B: 9 min · GPU for 8B: none</sub> |"
CODE, WORDS = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def write(root, files):
    """A repository of these files; a list of cells makes a notebook."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        notebook = nbformat.v4.new_notebook(cells=content if isinstance(content, list) else [])
        path.write_text(content if isinstance(content, str) else nbformat.writes(notebook), encoding="utf-8")
    return Repository(root)


def translated(english, korean, **files):
    """A notebook of one cell and its overlay, whose entry is of this text."""
    entry = f"<!-- cell a {translation.hash_of(english)} -->\n{korean}"
    return {"notebooks/01_a.ipynb": [WORDS(english, id="a")], KOREAN: entry, **files}


def test_this_repository_keeps_every_rule(capsys):
    assert check_repo.main() == 0, capsys.readouterr().out


BROKEN = {
    "helpers_look": [
        ({f"{PACKAGE}/a.py": "model.train()\ntrainer.train()"}, r"^llama_sft_helpers/a.py:2: calls train;"),
        ({f"{PACKAGE}/a.py": "self.trainer.train(x)\nmodel.train()"}, "a.py:1: calls train;"),
        ({f"{PACKAGE}/a.py": "SFTTrainer(model).train()"}, "calls SFTTrainer"),
        ({f"{PACKAGE}/a.py": "\nM.from_pretrained('x')"}, "a.py:2: calls from_pretrained"),
    ],
    "dependencies_point_one_way": [
        (
            {f"{PACKAGE}/lora/a.py": f"import {PACKAGE}.plots", f"{PACKAGE}/data/b.py": "",
             f"{PACKAGE}/plots.py": f"import {PACKAGE}.data"},
            "lora:1: reaches data; move",
        ),
        (
            {f"{PACKAGE}/a.py": f"from {PACKAGE} import b", f"{PACKAGE}/b.py": f"from {PACKAGE}.a import f"},
            "a:1: reaches a; ",
        ),
        ({f"{PACKAGE}/core/a.py": f"import {PACKAGE}.b", f"{PACKAGE}/b.py": ""}, "core:1: reaches b"),
    ],
    "contents_are_true": [
        ({LORA: TABLE, f"{PACKAGE}/lora/tables.py": "from x import f"}, "py:2: tables does not define f"),
        ({LORA: TABLE.partition("  #")[0] + "\n}", f"{PACKAGE}/lora/tables.py": "f = 1"}, "f has no remark"),
    ],
    "names_have_one_path": [
        ({LORA: TABLE, f"{PACKAGE}/data/__init__.py": TABLE}, "f is offered in 2 places"),
        ({LORA: TABLE, f"{PACKAGE}/lora/f.py": ""}, "the module f hides the function"),
    ],
    "no_detours": [
        (
            {LORA: TABLE, "tests/test_a.py": f"from {PACKAGE}.lora.tables import f, _g"},
            r"tests/test_a.py:1: \S+lora.tables.f: import it from llama_sft_helpers.lora$",
        ),
    ],
    "imports_are_declared": [
        (
            {f"{PACKAGE}/a.py": "import re\ndef f():\n    from httpx.x import y", "pyproject.toml": ""},
            "a.py:3: imports httpx, which nothing declares",
        ),
        ({"notebooks/01_a.ipynb": [CODE("%pip install x\nimport yaml")]}, "ipynb:cell 1: imports yaml"),
        ({f"{PACKAGE}/a.py": "import yaml, pytest", **EXTRAS}, "a.py:1: imports pytest, which nothing"),
    ],
    "extras_are_imported_late": [
        ({f"{PACKAGE}/a.py": "def f():\n  import yaml\nimport yaml.x", **EXTRAS}, "a.py:3: imports yaml, a"),
    ],
    "requirements_are_used": [
        (
            {f"{PACKAGE}/a.py": "import yaml", "pyproject.toml":
             '[project]\ndependencies = ["jinja2", "PyYAML", "httpx>=1"]'},
            r"^pyproject.toml:1: requires httpx, which",
        ),
        (EXTRAS, "requires pyyaml, which nothing imports"),
    ],
    "modules_are_short": [({f"{PACKAGE}/a.py": "a = 1\n" * 351}, "a.py:350: has 351 lines; split it")],
    "nothing_runs_foreign_code": [
        ({f"{PACKAGE}/a.py": code}, f"a.py:1: {fault}")
        for code, fault in {
            "f(trust_remote_code=True)": "passes trust_remote_code=True",
            "f(weights_only=x)": "passes weights_only=x",
            "f(**{'trust_remote_code': True})": "names trust_remote_code",
            "pickle.loads(x)": "calls pickle.loads",
            "torch.load(x)": "calls torch.load without",
            "run('ls', shell=True)": "passes shell=",
            "from x import *": "imports a star",
            "if False: f()": "has a block under",
        }.items()
    ],
    "real_calls_are_visible": [
        (
            {"notebooks/08_speed.ipynb": [CODE("from trl import SFTTrainer\nmy_SFTTrainer()")]},
            "08_speed.ipynb:1: does not show SFTTrainer",
        ),
        ({"notebooks/01_environment.ipynb": [CODE('subprocess.run(["nvidia-smi"])')]}, "not show nvcc"),
    ],
    "imports_come_from_packages": [
        ({"notebooks/04_lora.ipynb": [CODE(f"from {PACKAGE}.lora.tables import f")]}, "cell 1: imports"),
        ({"notebooks/04_lora.ipynb": [CODE(f"from {PACKAGE}.core import f")]}, "cell 1: imports"),
    ],
    "recipe_is_literal": [
        ({"notebooks/03_quantization.ipynb": [CODE("BitsAndBytesConfig(x)")]}, "lacks load_in_8bit=True"),
        ({"notebooks/06_training.ipynb": [CODE("LoraConfig(r = 8)")]}, "lacks r=16"),
    ],
    "openings_are_alike": [
        ({"notebooks/01_a.ipynb": [WORDS("# 02 · x"), CODE("1")]}, r"lacks '# 01 · '"),
        (
            {"notebooks/01_a.ipynb": [WORDS(""), CODE("1")], "notebooks/02_b.ipynb": [WORDS(""), CODE("2")]},
            "02_b.ipynb:cell 2: its install cell differs",
        ),
    ],
    "closings_are_alike": [({"notebooks/01_a.ipynb": [WORDS("## Exercises")]}, "lacks '## References'")],
    "cells_are_short": [
        ({"notebooks/01_a.ipynb": [CODE("1\n" * 31)]}, "cell 1: has 31 lines"),
        ({"notebooks/01_a.ipynb": [CODE("1\n" * 9)]}, "have 9 lines"),
        ({"notebooks/02_a.ipynb": [*map(CODE, "123"), CODE("if x:\n    import y")]}, "cell 4: imports late"),
        ({"notebooks/02_a.ipynb": [CODE("1"), CODE("import y")]}, "cell 2: imports in the open"),
    ],
    "files_are_clean": [
        ({"notebooks/01_a.ipynb": [CODE("1", metadata={"execution": {}})]}, "cell 1: holds the time"),
        ({"notebooks/01_a.ipynb": [WORDS("in /home/me/x")]}, "cell 1: '/home/' belongs to one machine"),
        ({"notebooks/01_a.ipynb": [CODE("x" * 2**20)]}, "has 1024 KiB"),
    ],
    "figures_have_words": [
        (
            {"notebooks/01_a.ipynb": [CODE("1", outputs=[FIGURE])]},
            "cell 1: its figure has no alternative text",
        ),
    ],
    "outputs_are_current": [
        ({"notebooks/01_a.ipynb": [CODE("1", execution_count=2)]}, "other code or versions"),
        ({"notebooks/01_a.ipynb": [CODE("1", execution_count=2)]}, "did not run once each"),
        (
            {"notebooks/01_a.ipynb": [CODE("1", outputs=[nbformat.v4.new_output("error")])]},
            "cell 1: its output is an error",
        ),
    ],
    "pictures_are_recorded_figures": [
        ({"README.md": "\n![x](docs/images/gone.png)"}, "README.md:2: shows gone"),
        ({"docs/images/old.png": "x"}, "old.png:1: is not the recorded figure"),
    ],
    "minutes_are_measured": [
        ({"notebooks/01_a.ipynb": []}, "was never timed"),
        (
            {"README.md": MINUTES, "benchmarks/results/cpu_demo.json": '{"seconds": {"01_a": 100}}'},
            r"README.md:1: 01_a took 100 s \(CPU demo\)",
        ),
        (
            {"README.md": MINUTES, "benchmarks/results/notebooks_on_gpu.json":
             '{"runs": [{"notebook": "01_a", "model": "llama3-8b-shape", "profile": "colab-a100", '
             '"seconds": 60}]}'},
            r"README.md:1: 01_a took 60 s \(8B\)",
        ),
    ],
    "wheel_has_every_package": [({LORA: ""}, "llama_sft_helpers.lora is not listed")],
    "classifiers_are_true": [
        ({"pyproject.toml": PYTHONS, ".github/workflows/tests.yml": "python: [3.11]"},
         r"classifiers name Python \['3.11'\], requires-python is '>=3.11,<3.13'"),
        ({"pyproject.toml": PYTHONS, ".github/workflows/tests.yml": "python: [3.12, 3.13]"},
         "tests.yml name Python \\['3.12', '3.13'\\]"),
    ],
    "steps_are_complete": [
        ({}, "notebooks/04_lora.ipynb:1: is missing"),
        ({}, "README.md:1: has no row for 04_lora"),
        ({}, "tests/lora:1: holds no tests"),
        (
            {"README.md": f"| **[04 · LoRA](notebooks/04_lora.ipynb)** [`lora/`]({PACKAGE}/data/) |"},
            "README.md:1: the links of 04_lora do not lead",
        ),
    ],
    "one_repository_address": [
        (
            {"README.md": "git+https://github.com/other/fork", "pyproject.toml":
             '[project.urls]\nRepository = "https://github.com/a/b"'},
            r"README.md:1: names \['other/fork'\] instead of a/b",
        ),
        ({}, "mkdocs.yml:1: repo_url is not"),
    ],
    "requirements_leave_colab_alone": [
        ({"requirements-colab.txt": "numpy>=2"}, "txt:1: 'numpy>=2' would move"),
        ({"requirements-colab.txt": "# x\ntrl==1"}, "txt:2: 'trl==1' does not say why"),
    ],
    "bounds_are_met_by_colab": [
        ({"pyproject.toml": f'[project]\ndependencies = ["{bound}"]', "constraints-colab.txt": "peft==1.0"},
         "moves Colab's peft 1.0")
        for bound in ("peft>=2", "peft<3")
    ] + [
        ({**EXTRAS, "constraints-colab.txt": "pyyaml==1.0"}, "moves Colab's pyyaml 1.0"),
    ],
    "lock_holds_every_requirement": [
        ({"constraints-tested.txt": "numpy==2.1.3\ntrl==1.16.0", **files}, f"txt:1: does not meet {fault}")
        for fault, files in {
            "pytest==9": {"requirements-test.txt": "pytest==9  # x"},
            "trl==1.17": {"requirements-colab.txt": "trl==1.17"},
            "PyYAML": {"requirements-run.txt": "PyYAML"},
            "numpy>=2.2": {"pyproject.toml": '[project]\ndependencies = ["numpy>=2.2"]'},
        }.items()
    ],
    "hashes_follow_the_lock": [
        ({"constraints-tested.txt": "torch==2\npeft==1", "requirements-hashed.txt": text}, f"1: {pin} is not")
        for text, pin in {
            "peft==0 \\\n    --hash=sha256:" + "0" * 64: "peft==0",
            "peft==1 \\\n    --hash=sha256:short": "peft==1",
            "": "peft==1",
        }.items()
    ],
    "dependencies_are_audited": [({}, "no workflow runs pip-audit")],
    "actions_are_pinned": [
        ({".github/workflows/a.yml": "- uses: a/b@v4"}, "a.yml:1: a/b@v4 is no commit"),
    ],
    "results_name_their_source": [
        ({RESULT: '{"card": "H100", "command": "make record"}'}, "names no card or no versions"),
        ({RESULT: '{"card": 1, "versions": 1, "command": "x"}'}, "its command is 'x'"),
    ],
    "ladder_is_the_recorded_one": [
        (
            {"benchmarks/results/speed_h200_40gib.json": json.dumps({"command": "", "versions": {}, "rungs": [
                {"rung": name, "tokens_per_second": speed, "peak_reserved_gib": 2}
                for name, speed in {"plain": 1000, "fast": 5000}.items()
            ]})},
            rf"docs/speed.md:1: lacks {re.escape(repr(text))}",
        )
        for text in ("| fast | 5,000 | 2.0 |", "5.0 times `plain`")
    ],
    "rows_are_well_formed": [
        ({ROWS: json.dumps(row)}, f"jsonl:1: {fault}")
        for row, fault in [
            ({"prompt": "x"}, "has the columns"),
            ({"instruction": "x", "input": "", "output": ""}, "output is '', not a text"),
            ({"instruction": "x ", "input": "", "output": "y"}, "instruction carries white space"),
        ]
    ] + [
        ({ROWS: '{"instruction": "Say hi!"}\n{"instruction": "say hi"}'}, "jsonl:2: asks what line 1 asks"),
    ],
    "every_cell_is_translated": [
        (
            translated("new", "옛말") | {KOREAN: "<!-- cell a 0123456789ab -->\n옛말"},
            r"(?s)a.md:1: cell a translates an older text; .*--stamp 01_a a\n.*now\nnew\n.*Korean\n옛말",
        ),
        (translated("x", "") | {KOREAN: ""}, "01_a.md:1: cell a is missing; translate it:\nx"),
        (translated("x", "가\n<!-- cell b 0123456789ab -->\n나"), "01_a.md:3: cell b is not in 01_a.ipynb"),
        (translated("x", "가\n<!-- cell a 0123456789ab -->\n나"), r"several entries for \['a'\]"),
        (
            {
                "notebooks/01_a.ipynb": [WORDS("x", id="a"), WORDS("y", id="b")],
                KOREAN: "<!-- cell b 0123456789ab -->\n나\n\n<!-- cell a 0123456789ab -->\n가",
            },
            "its cells in another order than 01_a.ipynb",
        ),
        ({"README.md": "x\n\n## A b\ny"}, "README.md:1: cell a-b is missing"),
    ],
    "translations_hold_what_the_text_holds": [
        (translated(english, korean), f"cell a: {fault}")
        for english, korean, fault in [
            ("1,024 in 0.2 s", "0.3초에 1,024", "numbers differ; only in English: '0.2'; .* '0.3'"),
            ("in [03](03_b.ipynb)", "03에서", "link targets differ"),
            ("![a](b.png) c", "[a](b.png) c", "pictures differ"),
            ("call `f(1)`", "`f(2)`를", r"code differ; only in English: '`f\(1\)`'"),
            ("```\na = 1\n```", "```\na = 2\n```", "fenced code differ"),
            ("so $a_1$ is", "$a_2$는", "formulas differ"),
            ("# a\n## b", "## a\n# b", "headings stand in another order"),
            ("<details>x</details>", "<details open>x</details>", "tags differ"),
            ("| a | b |\n|---|---|", "| a | b |\n|---|", "table rows differ"),
            ("- a\n- b", "- a b", "list items differ"),
        ]
    ],
    "terms_are_those_of_the_glossary": [
        (translated(english, korean, **{"translations/ko/glossary.toml": GLOSSARY}), f"cell a: {fault}")
        for english, korean, fault in [
            ("The losses", "로스가 줄고", "'로스' stands for loss; write '손실'"),
            ("Loss falls", "값이 줄고", "'Loss' stands in English, '손실' not in Korean"),
        ]
    ],
    "korean_files_are_built": [
        (translated("x", "가"), "notebooks/ko/01_a.ipynb:1: is not what the build makes"),
        ({"notebooks/ko/01_b.ipynb": []}, "ko/01_b.ipynb:1: is not in the Korean edition"),
    ],
    "rows_are_of_many_kinds": [({}, "0 Korean rows; have 10 at least")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "files", "message"),
    [pytest.param(name, *case, id=f"{name}-{i}") for name in BROKEN for i, case in enumerate(BROKEN[name])],
)
def test_a_broken_rule_is_named_with_its_place(rule, files, message, tmp_path, monkeypatch):
    monkeypatch.setattr(check_notebooks, "WAITING", ())
    monkeypatch.setattr(translation, "WAITING", ())
    rules = {function.__name__: function for function in check_repo.RULES}
    found = list(rules[rule](write(tmp_path, files)))
    assert any(re.search(message, line) for line in found), found


def test_every_rule_is_broken_once():
    assert {rule.__name__ for rule in check_repo.RULES} == set(BROKEN)


def test_switching_a_mode_is_no_training(tmp_path):
    repo = write(tmp_path, {f"{PACKAGE}/a.py": "model.train()\nmodel.train(False)\nlayer.mlp.train(mode)"})
    assert list(check_package.helpers_look(repo)) == []


def test_a_waiting_notebook_needs_no_current_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(check_notebooks, "WAITING", ("04_lora",))
    repo = write(tmp_path, {"notebooks/04_lora.ipynb": [CODE("1")]})
    assert list(check_notebooks.outputs_are_current(repo)) == []
