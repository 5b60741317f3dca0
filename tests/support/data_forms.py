"""The six forms in which own data come, each with the same questions and answers."""

import csv
import json

from datasets import Dataset

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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"own.{form}"
    if form in ("csv", "folder"):
        path = folder / "own" / "rows.csv" if form == "folder" else path
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(OWN)
        return (path.parent if form == "folder" else path), COLUMNS, "alpaca"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in CHATS), encoding="utf-8")
        return path, None, "messages"
    if form == "json":
        path.write_text(json.dumps(PAIRED, indent=1), encoding="utf-8")
        return path, None, "prompt-completion"
    Dataset.from_list(OWN).to_parquet(path)
    return path, COLUMNS, "alpaca"
