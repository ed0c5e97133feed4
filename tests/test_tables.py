"""What a user gave is what is read, from files and from memory; else one line says what to do."""

import csv
import gzip
import importlib
import io
import json
from collections import UserDict

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from icu_nb.cle import nearest_neighbors
from icu_nb.data.sources import load_corpus
from icu_nb.errors import InputError
from icu_nb.iur import calibrate_thresholds
from icu_nb.methods.edits import retrain
from icu_nb.metrics import perplexity
from icu_nb.models.tiny import memorize
from icu_nb.pairs import prepare_task
from icu_nb.sampled_pool import sample_pool
from icu_nb.tables import read_table
from icu_nb.text import check_texts, deduplicate, read_texts, tokenize
from icu_nb.unlearn import unlearn

TEXTS = ["Anna Berg, born 1970, lives at Rosenweg 5", 'She said: "None; nothing."', "007", "Zoë\tin Łódź"]


def written(folder, name, content):
    """A file with these bytes or, in UTF-8, these characters; line ends stay as they are."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- CSV files as people have them ----

READ = {
    "commas in the only column": ("text\nAnna, born 1970\n", ["Anna, born 1970"]),
    "commas in quotes": ('id,text\n1,"Anna, born 1970"\n', ["Anna, born 1970"]),
    "no line end at the end": ("text\nAnna", ["Anna"]),
    "Windows line ends": ("id,text\r\n1,Anna\r\n2,Bo\r\n", ["Anna", "Bo"]),
    "old Mac line ends": ("id,text\r1,Anna\r2,Bo\r", ["Anna", "Bo"]),
    "blank lines": ("\n\nid,text\n\n1,Anna\n\n\n2,Bo\n\n", ["Anna", "Bo"]),
    "a byte-order mark": (b"\xef\xbb\xbftext,id\nZo\xc3\xab,1\n", ["Zoë"]),
    "UTF-16 of Excel": ("id\ttext\r\n1\tZoë, 5\r\n".encode("utf-16"), ["Zoë, 5"]),
    "UTF-16, big end first": (b"\xfe\xff" + "text\nZoë\n".encode("utf-16-be"), ["Zoë"]),
    "UTF-32": ("text\nZoë\n".encode("utf-32"), ["Zoë"]),
    "semicolons": ('id;text\n1;Anna, born 1970\n2;"Bo; 1980"\n', ["Anna, born 1970", "Bo; 1980"]),
    "tabs": ("id\ttext\n1\tAnna; Bo, Cy\n", ["Anna; Bo, Cy"]),
    "names in quotes": ('"id";"text"\n"1";"Anna"\n', ["Anna"]),
    "a comma in a name": ('"id, number";text\n1;Anna\n', ["Anna"]),
    "quotes twice": ('text\n"She said ""hi"", twice"\n', ['She said "hi", twice']),
    "only quotes": ('id,text\n1,""""\n2,""""""\n', ['"', '""']),
    "quotes in the middle": ('id,text\n1,A 5" pipe and "more"\n', ['A 5" pipe and "more"']),
    "line ends in quotes": ('id,text\n1,"Anna\r\nBerg\r\n\rend"\n2,Bo\n', ["Anna\r\nBerg\r\n\rend", "Bo"]),
    "U+2028 and its like": ("text\na\u2028b\x85c\x0bd\x0ce\x1cf\n", ["a\u2028b\x85c\x0bd\x0ce\x1cf"]),
    "blanks": ("text,id\n  Anna  ,1\n", ["  Anna  "]),
    "names of nothing": ("id,text\n,None\n,NaN\n,null\n,007\n,1e5\n", ["None", "NaN", "null", "007", "1e5"]),
    "a long text": ("text\n" + "x" * 800_000 + "\n", ["x" * 800_000]),
    "a comment sign": ("text,id\n# Anna,1\n", ["# Anna"]),
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("name", ["texts.csv", "TEXTS.CSV"])
def test_csv_files_that_are_read(case, name, tmp_path):
    content, texts = READ[case]
    assert read_texts(written(tmp_path, name, content)) == texts


REFUSED = {
    "too many cells": ("id,text\n1,Anna Berg, born 1970\n", "line 2: 3 cells.*names 2.*quotes"),
    "too few cells": ("id,text\n1,Anna\n2\n", "line 3: 1 cells.*names 2"),
    "too many, later": ("id;text\n1;A\n\n2;B;C\n", "line 4: 3 cells"),
    "too many, behind line ends": ('id,text\n1,"a\nb\n"\n2,a,b\n', "line 5: 3 cells"),
    "all too many": ("text,id\n1,a,b\n2,a,b\n", "line 2: 3 cells"),
    "a comma at the end": ("id,text\n1,Anna,\n", "line 2: 3 cells"),
    "an open quote": ('id,text\n1,Anna\n2,"Bo\n3,Cy\n', "line 3: the quotes.*twice"),
    "an open quote alone": ('text\n"Bo\nCy\n', "line 2: the quotes"),
    "an open quote that another one closes": ('text,id\n"Bo,1\n"Cy",2\n', "line 2: the quotes"),
    "text behind quotes": ('text\nAnna\n"Bo" says, hi\n', "line 3: the quotes"),
    "backslashes for quotes": ('id,text\n1,"She said \\"hi\\", twice"\n', "line 2: the quotes"),
    "a blank before quotes": ('id, text\n1, "Anna"\n', "line 2: a blank.*Remove the blank"),
    "a blank before quotes over lines": ('text\n "Anna\nBerg"\n', "line 2: a blank"),
    "an open name": ('"text\nAnna\n', "line 1: the quotes"),
    "a name twice": ("text,id,text\na,b,c\n", "line 1: two columns have the same name"),
    "two line ends": ("text\na\rb\n", "line 2 ends otherwise"),
    "Windows and others": ("text\r\na\r\nb\n", "line 3 ends otherwise"),
    "a NUL": ("text\nAnna\nBo\0\n", "line 3: a NUL character.*UTF-8"),
    "UTF-16 without a mark": ("text\nAnna\n".encode("utf-16-le"), "line 1: a NUL.*UTF-8"),
    "Latin-1": (b"text\r\nAnna\r\nZo\xeb\r\n", "line 3: it is not UTF-8.*Save the file as UTF-8"),
    "half of UTF-16": ("text\nAnna\n".encode("utf-16")[:-1], "it is not UTF-16"),
    "no rows": ("id,text\n", "there are no texts"),
    "nothing": ("", "there are no texts"),
    "a mark alone": (b"\xef\xbb\xbf", "there are no texts"),
    "only blank lines": ("\n\n\n", "there are no texts"),
    "no names": ("Anna Berg\nBo Berg\n", "none of the 1 columns.*line of names"),
    "another name": ("id,body\n1,Anna\n", r"'text' \(they are: id, body\)"),
    "a blank before a name": ("id, text\n1,a\n", r"'text' \(but one ' text'\)"),
    "a capital name": ("Text\na\n", r"'text' \(but one 'Text'\)"),
    "an empty cell": ('id,text\n1,Anna\n\n2,\n3,"  "\n', r"no text, or an empty one, at line \[4, 5\]"),
    "an Excel file": (b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0\x62\xee", "cannot be read as .csv"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_csv_files_that_are_refused(case, tmp_path):
    content, words = REFUSED[case]
    with pytest.raises(InputError, match=f"`source`.*{words}") as error:
        read_texts(written(tmp_path, "texts.csv", content))
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    assert "Anna" not in message and "Berg" not in message  # it shows no text


def test_the_limit_of_csv_cells_is_as_before(tmp_path):
    """It belongs to the whole process."""
    before = csv.field_size_limit()
    read_texts(written(tmp_path, "texts.csv", "text\n" + "x" * 200_000))
    with pytest.raises(InputError):
        read_texts(written(tmp_path, "texts.csv", 'text\n"open'))
    assert csv.field_size_limit() == before == 131_072


# ---- JSON files as people have them ----

READ_JSON = {
    "lines": ("texts.jsonl", '{"text": "a"}\n\n{"text": "b"}', ["a", "b"]),
    "upper case": ("TEXTS.JSONL", '{"text": "a"}', ["a"]),
    "Windows line ends": ("texts.jsonl", '{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
    "old Mac line ends": ("texts.jsonl", '{"text": "a"}\r{"text": "b"}\r', ["a", "b"]),
    "a byte-order mark": ("texts.jsonl", '\ufeff{"text": "a"}', ["a"]),
    "UTF-16": ("texts.jsonl", '{"text": "Zoë"}\n'.encode("utf-16"), ["Zoë"]),
    "U+2028": ("texts.jsonl", '{"text": "a\u2028b\x85c"}', ["a\u2028b\x85c"]),
    "NaN beside the text": ("texts.jsonl", '{"text": "a", "score": NaN}', ["a"]),
    "other keys in each": ("texts.jsonl", '{"text": "a"}\n{"id": 1, "text": "b"}', ["a", "b"]),
    "one over lines": ("texts.json", '{\n "text": "a"\n}\n', ["a"]),
    "a list over lines": ("Texts.Json", '[\n {"text": "a"},\n {"text": "b"}\n]\n', ["a", "b"]),
    "lines, called json": ("texts.json", '{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "old Mac text": ("texts.TXT", "a\r\rb\r", ["a", "b"]),
    "text with U+2028": ("texts.txt", "a\u2028b\r\n  c, d\n", ["a\u2028b", "  c, d"]),
    "text in UTF-16": ("texts.txt", "Zoë\nBo\n".encode("utf-16"), ["Zoë", "Bo"]),
}


@pytest.mark.parametrize("case", READ_JSON)
def test_other_files_that_are_read(case, tmp_path):
    name, content, texts = READ_JSON[case]
    assert read_texts(written(tmp_path, name, content)) == texts


REFUSED_JSON = {
    "a key twice": ("texts.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', "line 2: a key stands twice"),
    "a key twice in a list": ("texts.json", '[{"text": "b", "text": "c"}]', "a key stands twice"),
    "a number": ("texts.jsonl", '{"text": "a"}\n\n{"text": 7}', r"at line \[3\]"),
    "NaN": ("texts.jsonl", '{"text": NaN}', r"at line \[1\]"),
    "null": ("texts.jsonl", '{"text": null}', r"at line \[1\]"),
    "no text in one": ("texts.jsonl", '{"text": "a"}\n{"id": 1}', r"at line \[2\]"),
    "no text in a list": ("texts.json", '[{"text": "a"}, {"id": 1}]', r"at index \[1\]"),
    "a list of strings": ("texts.json", '["a", "b"]', "index 0 is no record.*list"),
    "a dict of lists": ("texts.json", '{"text": ["a", "b"]}', r"no text.*at index \[0\]"),
    "splits": ("texts.json", '{"train": [{"text": "a"}]}', "none of the 1 columns.*train"),
    "a list in a line": ("texts.jsonl", '[{"text": "a"}]', "line 1 is no record"),
    "a second mark": ("texts.jsonl", '{"text": "a"}\n\ufeff{"text": "b"}', "line 2, column 1"),
    "cut off": ("texts.json", '[{"text": "a"},\n{"text": "b"', "line 2, column"),
    "no end of nesting": ("texts.jsonl", "\n" + "[" * 100_000, "line 2"),
    "a number without end": ("texts.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1"),
    "Latin-1": ("texts.jsonl", '{"text": "a"}\n{"text": "Zoë"}'.encode("latin-1"), "line 2: it is not UTF-8"),
    "a NUL": ("texts.txt", "a\n\0b\n", "line 2: a NUL"),
    "compressed": ("texts.jsonl.gz", gzip.compress(b'{"text": "a"}'), "ending in '.gz'"),
    "compressed, called otherwise": (
        "texts.jsonl",
        gzip.compress(b'{"text": "a"}'),
        "line 1: it is not UTF-8",
    ),
    "no ending": ("texts", "a\n", "ending in ''"),
    "nothing": ("texts.json", "", "there are no texts"),
    "an empty list": ("texts.json", "[]", "there are no texts"),
}


@pytest.mark.parametrize("case", REFUSED_JSON)
def test_other_files_that_are_refused(case, tmp_path):
    name, content, words = REFUSED_JSON[case]
    with pytest.raises(InputError, match=f"`source`.*{words}") as error:
        read_texts(written(tmp_path, name, content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


# ---- whatever a program writes is read as it was ----

# A NUL stands in no file, and half a character cannot be written.
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.text(
    "\",;\t\r\n 'a\u2028\ufeff\\"
)
NAMES = st.text("abcde \u00eb_", min_size=1, max_size=5)


@st.composite
def tables(draw, cells=CELLS):
    """Columns with names, and rows of strings."""
    names = draw(st.lists(NAMES, unique=True, min_size=1, max_size=4))
    row = st.tuples(*[cells] * len(names)).map(list)
    return names, draw(st.lists(row, min_size=1, max_size=5))


def is_read(path, names, rows):
    table = read_table(path)
    assert list(table.columns) == names
    assert table.to_numpy().tolist() == rows
    return True


def is_read_or_refused(path, names, rows):
    """A lone line end that the writer left without quotes can be told from a row's end by no reader."""
    try:
        return is_read(path, names, rows)
    except InputError:
        return False


@given(
    tables(),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_csv_writes(tmp_path_factory, table, delimiter, line_end, quoting, codec):
    names, rows = table
    buffer = io.StringIO(newline="")
    # A file of one column has no separator by which another than the comma could be known.
    delimiter = "," if len(names) == 1 else delimiter
    csv.writer(buffer, delimiter=delimiter, lineterminator=line_end, quoting=quoting).writerows(
        [names, *rows]
    )
    path = written(tmp_path_factory.getbasetemp(), "given.csv", buffer.getvalue().encode(codec))
    whole = is_read_or_refused(path, names, rows)
    assert whole or (quoting == csv.QUOTE_MINIMAL and line_end != "\r\n")
    assert whole or any(set(cell) & {*"\r\n"} - {*line_end} for row in rows for cell in row)


@given(tables(), st.booleans())
def test_what_pandas_writes_as_csv(tmp_path_factory, table, index):
    names, rows = table
    path = tmp_path_factory.getbasetemp() / "given.csv"
    pd.DataFrame(rows, columns=names).to_csv(path, index=index)
    if index:
        names, rows = ["", *names], [[str(i), *row] for i, row in enumerate(rows)]
    assert is_read_or_refused(path, names, rows) or any("\r" in cell for row in rows for cell in row)


JSON_TEXTS = st.text(st.characters(codec="utf-8"))


@given(tables(JSON_TEXTS), st.booleans(), st.sampled_from(["json", "jsonl", "lines.json", "pretty.json"]))
def test_what_json_writes(tmp_path_factory, table, ascii_only, kind):
    names, rows = table
    records = [dict(zip(names, row, strict=True)) for row in rows]
    if kind in ("json", "pretty.json"):
        content = json.dumps(records, ensure_ascii=ascii_only, indent=2 if "pretty" in kind else None)
    else:
        content = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    is_read(written(tmp_path_factory.getbasetemp(), f"given.{kind}", content), names, rows)


@given(tables(JSON_TEXTS), st.sampled_from(["records", "lines"]))
def test_what_pandas_writes_as_json(tmp_path_factory, table, kind):
    names, rows = table
    path = tmp_path_factory.getbasetemp() / "given.json"
    pd.DataFrame(rows, columns=names).to_json(path, orient="records", lines=kind == "lines")
    is_read(path, names, rows)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n")), min_size=1))
def test_lines_of_text(tmp_path_factory, lines):
    assume(any(line.strip() for line in lines) and not lines[0].startswith("\ufeff"))
    path = written(tmp_path_factory.getbasetemp(), "given.txt", "\n".join(lines))
    assert read_texts(path) == [line for line in lines if line.strip()]


# ---- texts in memory ----

FRAME = pd.DataFrame({"id": range(4), "text": TEXTS})
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
DATASET = datasets.Dataset.from_dict({"text": TEXTS, "id": [*range(4)]})
SAME = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "values of a dict": lambda: dict(enumerate(TEXTS)).values(),
    "array": lambda: np.array(TEXTS),
    "array of objects": lambda: np.array(TEXTS, dtype=object),
    "list of NumPy's strings": lambda: list(np.array(TEXTS)),
    "Series": lambda: FRAME["text"],
    "Series with its own index": lambda: FRAME["text"].set_axis(["columns", "b", "b", "ndim"]),
    "categories": lambda: FRAME["text"].astype("category"),
    "Index": lambda: pd.Index(TEXTS),
    "DataFrame": lambda: FRAME,
    "DataFrame with its own index": lambda: FRAME.set_index("id", drop=False).iloc[:4],
    "DataFrame of Arrow": lambda: FRAME.convert_dtypes(dtype_backend="pyarrow"),
    "records": lambda: RECORDS,
    "records from a generator": lambda: (UserDict(record) for record in RECORDS),
    "Dataset": lambda: DATASET,
    "Dataset in another format": lambda: DATASET.with_format("numpy"),
    "Dataset, turned twice": lambda: DATASET.select([3, 2, 1, 0]).select([3, 2, 1, 0]),
    "Dataset with a transform": lambda: datasets.Dataset.from_dict({"id": [*range(4)]}).with_transform(
        lambda rows: {"text": [TEXTS[i] for i in rows["id"]]}
    ),
    "column of a Dataset": lambda: DATASET["text"],
    "rows of a CSV file": lambda: csv.DictReader(io.StringIO(FRAME.to_csv(index=False))),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("read", [check_texts, read_texts])
def test_the_same_texts_from_everywhere(kind, read):
    texts = read(SAME[kind]())
    assert texts == TEXTS and {*map(type, texts)} == {str}


def streamed():
    return DATASET.to_iterable_dataset()


OTHERS = {
    "one string": (lambda: "a text", "Put it in a list"),
    "bytes": (lambda: b"a text", "Decode"),
    "a list of bytes": (lambda: [b"a text"], r"index \[0\]"),
    "dict": (lambda: {"text": TEXTS}, "mapping.*Name a split or a column"),
    "DatasetDict": (lambda: datasets.DatasetDict(train=DATASET), r"mapping.*split.*\[\"train\"\]"),
    "streams": (lambda: datasets.IterableDatasetDict(train=streamed()), "mapping.*split"),
    "another mapping": (lambda: UserDict(text=TEXTS), "mapping"),
    "stream": (streamed, r"no end.*stream\.take"),
    "set": (lambda: {*TEXTS}, "no order.*sorted"),
    "frozenset": (lambda: frozenset(TEXTS), "no order.*sorted"),
    "open file": (lambda: io.StringIO("text\nAnna\n"), "Give its path"),
    "another table": (lambda: AnotherTable(), "is no list of texts.*DataFrame"),
    "number": (lambda: 7, "int is no list of texts"),
    "None": (lambda: None, "NoneType is no list of texts"),
    "array of rows": (lambda: np.array([TEXTS, TEXTS]), "ndarray is no list"),
    "array of one": (lambda: np.array("a text"), "ndarray is no list"),
    "pairs": (lambda: ["a", ("b", "c")], r"index \[1\]"),
    "token ids": (lambda: [[5, 6], [7]], r"index \[0, 1\]"),
    "None in a list": (lambda: ["a", None, float("nan"), pd.NA], r"index \[1, 2, 3\]"),
    "None in a Series": (lambda: pd.Series(["a", None, "b"], index=[7, 8, 9]), r"index \[1\]"),
    "None in a DataFrame": (lambda: pd.DataFrame({"text": ["a", None]}, index=[4, 4]), r"index \[1\]"),
    "None in a data set": (lambda: datasets.Dataset.from_dict({"text": ["a", None]}), r"index \[1\]"),
    "other columns": (lambda: FRAME.rename(columns={"text": "body"}), r"\(they are: id, body\)"),
    "other records": (lambda: [{"body": "a"}], r"\(they are: body\)"),
    "a name twice": (lambda: pd.DataFrame([["a", "b"]], columns=["text", "text"]), "the same name"),
    "names in two rows": (lambda: pd.DataFrame([["a"]], columns=[["text"], ["x"]]), "none of the 1 columns"),
    "records and texts": (lambda: [{"text": "a"}, "b"], r"no record at index \[1\]"),
    "no rows": (lambda: FRAME[:0], "there are no texts"),
    "no columns": (lambda: pd.DataFrame(index=[0]), "none of the 0 columns"),
}


class AnotherTable:
    """A table of a library that is not known here; it iterates over its names, as pandas does."""

    columns = ("text",)

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_holds_no_list_of_texts(kind):
    make, words = OTHERS[kind]
    with pytest.raises(InputError, match=f"`forget`: .*{words}") as error:
        check_texts(make(), "forget")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_data_frame_is_not_changed():
    before = FRAME.copy()
    table = read_table(FRAME)
    table["text"] = "changed"
    pd.testing.assert_frame_equal(FRAME, before)


def test_columns_are_chosen():
    table = read_table(DATASET, ["text", "input_ids"])
    assert list(table.columns) == ["text"] and read_table(RECORDS).to_dict("records") == RECORDS


def test_lines_outlive_the_table(tmp_path):
    """The rows of a file are named by their lines, also where the table is cut or given on."""
    table = read_table(written(tmp_path, "texts.csv", "id,text\n1,a\n\n2,b\n3,\n"))
    assert table.index.tolist() == [2, 4, 5]
    with pytest.raises(InputError, match=r"line \[5\]"):
        check_texts(table[table["id"] != "1"])
    with pytest.raises(InputError, match=r"line \[5\]"):
        check_texts(table["text"])


# ---- every way in ----


def embed(texts):
    return np.random.default_rng(0).normal(size=(len(texts), 4))


def ways(tiny):
    """How texts come in, by the argument that messages name."""
    model, tokenizer, config = tiny.model, tiny.tokenizer, tiny.config()

    def task(**changes):
        given = {"forget": tiny.forget, "retain": tiny.retain, **changes}
        return prepare_task(model, tokenizer, config=config, **given)

    return {
        "forget": lambda texts: task(forget=texts).forget.tokens(),
        "retain": lambda texts: task(retain=texts).neighbors.tokens(),
        "alternatives": lambda texts: task(alternatives=texts).alternatives.tokens(),
        "heldout": lambda texts: calibrate_thresholds(model, tokenizer, texts, max_length=48),
        "forget ": lambda texts: nearest_neighbors(texts, tiny.retain, embedder=embed).tolist(),
        "retain ": lambda texts: nearest_neighbors(tiny.forget[:4], texts, embedder=embed).tolist(),
        "texts": lambda texts: perplexity(model, tokenizer, texts, max_length=48),
    }


WAYS = ["forget", "retain", "alternatives", "heldout", "forget ", "retain ", "texts"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_reads_tables(tiny, way):
    """A table gives what the list of its texts gives; its column names are no texts."""
    texts = tiny.heldout if way in ("heldout", "texts") else tiny.retain[:8]
    if way == "forget":
        texts = tiny.forget
    call = ways(tiny)[way]
    expected = call(texts)
    frame = pd.DataFrame({"id": range(len(texts)), "text": texts}).iloc[::-1].sort_values("id")
    for table in (
        frame,
        frame["text"],
        datasets.Dataset.from_pandas(frame, preserve_index=False),
        frame.to_dict("records"),
        (text for text in texts),
        np.array(texts, dtype=object),
    ):
        assert call(table) == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "kind", ["one string", "bytes", "dict", "DatasetDict", "stream", "set", "None in a list"]
)
def test_every_way_in_refuses_the_rest(tiny, way, kind):
    make, words = OTHERS[kind]
    with pytest.raises(InputError, match=f"`{way.strip()}`: .*{words}"):
        ways(tiny)[way](make())


@pytest.mark.parametrize("argument", ["forget", "retain", "heldout", "alternatives"])
def test_unlearn_refuses_a_mapping_before_it_trains(tiny, monkeypatch, argument):
    monkeypatch.setattr(
        importlib.import_module("icu_nb.unlearn"),
        "train_epoch",
        lambda *given: pytest.fail("it began to train"),
    )
    given = {"forget": tiny.forget, "retain": tiny.retain, "heldout": tiny.heldout}
    given[argument] = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": tiny.forget}))
    with pytest.raises(InputError, match=f"`{argument}`: a mapping"):
        unlearn(tiny.copy(), tiny.tokenizer, config=tiny.config(), **given)


def test_token_ids_with_gaps(tiny):
    given = datasets.Dataset.from_dict({"input_ids": [[5] * 48, None]})
    with pytest.raises(InputError, match=r"`forget`: no tokens at index \[1\]"):
        prepare_task(tiny.model, tiny.tokenizer, given, tiny.retain, tiny.config())


def test_smaller_functions_take_no_names_for_texts(tiny):
    """Those that no text needs to go through first."""
    frame, mapping = pd.DataFrame({"text": TEXTS}), {"text": TEXTS}
    assert tokenize(frame, tiny.tokenizer).tokens() == tokenize(TEXTS, tiny.tokenizer).tokens()
    assert deduplicate(frame, frame[:1]) == TEXTS[1:]
    for call in (
        lambda: tokenize(mapping, tiny.tokenizer),
        lambda: tokenize("one string", tiny.tokenizer),
        lambda: deduplicate(mapping, TEXTS),
        lambda: deduplicate(TEXTS, mapping),
        lambda: sample_pool(tiny.model, tiny.tokenizer, 1, mapping, max_length=8),
        lambda: retrain(tiny.copy(), tiny.tokenizer, mapping, TEXTS),
        lambda: retrain(tiny.copy(), tiny.tokenizer, TEXTS, mapping),
        lambda: memorize(tiny.copy(), tiny.tokenizer, mapping, [], epochs=1, cache=False),
    ):
        with pytest.raises(InputError, match=r"(?:texts|forget|against)`: (?:a mapping|one string)"):
            call()


def test_a_corpus_of_a_file_names_its_lines(tmp_path):
    path = written(tmp_path, "own.csv", "id,text\n1,Anna, born 1970\n")
    with pytest.raises(InputError, match=r"`dataset`: own.csv.*line 2: 3 cells"):
        load_corpus(path)
    with pytest.raises(InputError, match="`dataset`: a mapping"):
        load_corpus({"text": TEXTS})
