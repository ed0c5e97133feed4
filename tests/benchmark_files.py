"""Two questions in the published form of each of the nine benchmarks."""

import bz2
import json

CONTEXTS = (
    "{{'contexts': array(['{}', 'It ended.'], dtype=object), 'labels': array(['A', 'B'], dtype=object)}}"
)


def write_benchmarks(folder):
    """Fill a data folder; gives it back."""
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "completion").mkdir(exist_ok=True)
    two = {"gold": 1, "choices": ["he sang.", "he slipped."]}
    records = {
        "winogrande": [
            {
                "context_options": ["Ann met Bob as Ann", "Ann met Bob as he"],
                "continuation": "ran",
                "gold": 1,
            },
            {"context_options": ["The cup and Al", "The cup and it"], "continuation": "fell.", "gold": 0},
        ],
        "copa": [{"query": "The man fell, because", **two}, {"query": "I fell, therefore", **two, "gold": 0}],
        "arc_easy": [
            {"query": "Question: What is cold?", "choices": ["ice", "fire", "ice", "sun"], "gold": 3},
            {"query": "Question: What is hot?", "choices": ["ice", "fire", "snow", "rain"], "gold": 1},
        ],
        "arc_challenge": [
            {"query": "Question: What burns?", "choices": ["ice", "wood", "snow", "rain"], "gold": 1},
            {"query": "Question: What rises?", "choices": ["ice", "smoke", "ice", "rain"], "gold": 2},
        ],
        "piqa": [
            {"query": "Question: Cut bread.\n", "choices": ["Use a knife.", "Use a cup."], "gold": 0},
            {"query": "Question: Drink tea.\n", "choices": ["Use a knife.", "Use a cup."], "gold": 1},
        ],
        "math_qa": [
            {
                "query": f"Question: what is {i} plus {i} ?\nA. 2\nB. 4\nC. rs . 6\nD. none\nAnswer: ",
                "choices": ["A", "B", "C", "D"],
                "gold": i - 1,
            }
            for i in (1, 2)
        ],
    }
    for name, lines in records.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"benchmarks/{name}.jsonl").write_text(text)
    tasks = [
        ["Roof repair: A man sits on a roof. he", "1", "sings.", "pulls up the roof.", "swims.", "flies."],
        ["Health: How to sleep. Go to bed early.", "0", "Close your eyes.", "Eat.", "Run.", "Shout."],
    ]
    lines = "".join(f"{line}\n" for task in tasks for line in task)
    (folder / "benchmarks/hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(lines.encode()))
    (folder / "completion/lambada.csv").write_text("text\nann lives in leeds\nbob lives in york\n")
    rows = [("Is it?", "yes", "It is."), ("Is it not?", "no", "It is so.")]
    written = "".join(f'{question},{answer},"{CONTEXTS.format(text)}"\n' for question, answer, text in rows)
    (folder / "completion/pubmed_qa.csv").write_text(f"question,final_decision,context\n{written}")
    return folder
