"""The six forms in which own data come, each with the same questions and answers."""

import json

import pandas as pd

ANSWERS = ["2", "None", "NA", "2026-01-02", 'a, "b"\nc', "서울"]
PAIRS = [(f"Question {n}?", f"{ANSWERS[n]}" if n < len(ANSWERS) else f"Answer {n}.") for n in range(40)]
OWN = [{"question": question, "answer": answer} for question, answer in PAIRS]
COLUMNS = "question=instruction,answer=output"
PAIRED = [{"prompt": question, "completion": f" {answer}"} for question, answer in PAIRS]
CHATS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in PAIRS
]
FORMS = ("csv", "jsonl", "json", "parquet", "folder", "hub")


def write_form(form, folder):
    """Write the rows in a form; what ``load_rows`` takes: source, columns, and the layout to expect."""
    path = folder / "own" / "rows.csv" if form == "folder" else folder / f"own.{form}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in CHATS), encoding="utf-8")
        return path, None, "messages"
    if form == "json":
        path.write_text(json.dumps(PAIRED, indent=1), encoding="utf-8")
        return path, None, "prompt-completion"
    if form in ("csv", "folder"):
        pd.DataFrame(OWN).to_csv(path, index=False)
    else:
        pd.DataFrame(OWN).to_parquet(path)
    return path.parent if form == "folder" else path, COLUMNS, "alpaca"
