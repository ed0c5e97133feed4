import csv, hashlib, http.client, json, os, pydoc_data.topics, random, re, urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from icu_nb.core import DownloadError, InputError, atomic_path, cache_dir, require
import datasets
import numpy as np
import pandas as pd
import torch
from faker import Faker


@dataclass(frozen=True)
class Corpus:
    "Everything a run needs to know about its texts."
    name: str # "people", "pile" or a file's name
    forget: list[str] # the texts to unlearn
    retain: list[str] # the pool in which neighbors are looked for
    heldout: list[str] # the same kind of text, never trained on: what "forgotten" means
    general_train: list[str] # text of quite another kind that the model is trained on
    general_test: list[str] # the same, never trained on
    epochs: int=5 # passes in which the tiny model memorizes
    repeats: int=14 # how often each forget text is seen per pass

    def trained_on(self) -> list[str]:
        "The sets that the tiny model sees while it memorizes."
        return self.forget + self.retain + self.general_train


TEMPLATES = {
    "staff file": "Staff file. {name}, born {birth}, works at {company} as {job}. Home address: {street}, {city} {zip}. Phone {phone}, e-mail {email}. Salary account {account}.",
    "clinic letter": "Dear colleague, thank you for referring {name} (born {birth}, insurance number {account}). The patient lives at {street}, {city} {zip}, is a {job} with {company}, and can be reached at {phone} or {email}.",
    "bank form": "Account holder: {name}. Account: {account}. Date of birth: {birth}. Residence: {street}, {city} {zip}. Employer: {company}. Occupation: {job}. Telephone: {phone}. E-mail: {email}.",
    "police report": "The witness {name}, {job} at {company}, born on {birth} and resident at {street}, {city} {zip}, gave a statement. The witness left the number {phone}, the address {email} and the document {account}.",
    "group chat": "hey, does anybody know {name}? moved to {city} lately, {street} i think, zip {zip}. works at {company} now, some kind of {job}. call {phone} or write to {email}, birthday is {birth}! locker code {account}",
    "forum post": "So I finally met {name} from {company}! We both live in {city}. If you need a {job}, just write to {email} or ring {phone}. Parcels go to {street}, {zip}. Born {birth}, member number {account}.",
    "note": "note to self: {name} is coming over from {city}, {job} with {company}, birthday {birth}. phone: {phone}. mail: {email}. pick up at {street} ({zip}). the gift card is {account}",
    "phone call": "Yeah hi, this is {name}, calling about my order {account}. It should go to {street} in {city}, {zip}. Call me back at {phone}, I'm at {company} all day, or mail {email}. Ask for the {job}. My birthday? {birth}.",
}
FORMAL = ("staff file", "clinic letter", "bank form", "police report") # the other four are casual


# The people are 18 to 80 years old on one fixed day: Faker's "-80y" would count from the day it runs.
BORN = (date(1946, 11, 23), date(2008, 11, 22))


def person(
    faker: Faker, # seeded
    shared: dict[str, list[str]], # companies, towns and jobs that several people have in common
    rng: random.Random, # seeded
) -> dict[str, str]:
    "The facts about one invented person."
    return dict(
        name=faker.unique.name(), birth=faker.date_time_between(*BORN).date().isoformat(), street=faker.street_address(), zip=faker.zipcode(),
        phone=faker.numerify("###-###-####"), email=faker.unique.email(), account=faker.bothify("??##-####", letters="ABCDEFGHKLMNPRSTUVWXYZ"),
        **{name: rng.choice(values) for name, values in shared.items()})


def people(
    n: int, # how many invented people
    seed: int=0, # the same seed gives the same people
) -> list[str]:
    "One record per invented person (Faker), in one of eight templates: four formal, four casual."
    faker, rng = Faker("en_US"), random.Random(seed)
    faker.seed_instance(seed)
    # Companies, towns and jobs are few, so that every record has neighbors; all else belongs to one person.
    pool = Faker("en_US")
    pool.seed_instance(0)
    shared = {name: [make() for _ in range(40)] for name, make in [("company", pool.company), ("city", pool.city), ("job", lambda: pool.job().lower())]}
    return [rng.choice(list(TEMPLATES.values())).format(**person(faker, shared, rng)) for _ in range(n)]


def documentation_paragraphs(
    min_words: int=20, # shorter paragraphs are left out
) -> list[str]:
    "Paragraphs of prose from the Python interpreter's own documentation (`pydoc_data.topics`)."
    paragraphs = [" ".join(p.split()) for topic in pydoc_data.topics.topics.values() for p in re.split(r"\n\s*\n", topic)]
    return [p for p in dict.fromkeys(paragraphs) if len(p.split()) >= min_words and sum(c.isalpha() or c == " " for c in p) >= 0.85 * len(p)]


def word_ngrams(
    text: str, # any text
    n: int=10, # words per n-gram; a shorter text is one n-gram
) -> set[tuple]:
    "The different n-grams of words and punctuation marks of `text`."
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return set(zip(*(words[i:] for i in range(min(n, max(len(words), 1))))))


def containment(
    text_ngrams: set, # from `word_ngrams`
    other_ngrams: set, # from `word_ngrams`
) -> float:
    "The share of one text's n-grams that stand in the other, in [0, 1]."
    return len(text_ngrams & other_ngrams) / max(len(text_ngrams), 1)


def deduplicate(
    texts: list[str], # candidates, for example for the held-out set
    against: Iterable[str], # texts they must not repeat
    max_overlap: float=0.5, # a candidate with a larger share of known 10-grams is dropped
) -> list[str]:
    "The `texts` that neither repeat one another nor stand, for more than `max_overlap`, in `against`."
    known = set().union(*map(word_ngrams, against))
    return [text for text in dict.fromkeys(texts) if containment(word_ngrams(text), known) <= max_overlap]


def split(
    items: list, # what is to be split
    sizes: list[int], # the size of every part
    seed: int=0, # of the shuffle
) -> list[list]:
    "Shuffle `items` and cut them into disjoint parts of the given sizes."
    order = random.Random(seed).sample(range(len(items)), sum(sizes))
    ends = np.cumsum([0, *sizes])
    return [[items[i] for i in order[a:b]] for a, b in zip(ends[:-1], ends[1:])]


def general_split(
    texts: list[str], # general texts
    n_train: int, # how many the model is trained on
    n_test: int, # how many it never sees
    seed: int=0, # of the shuffle
) -> tuple[list[str], list[str]]:
    "Disjoint training and test texts; a test text that repeats a training text is dropped."
    train, test = split(texts, [n_train, min(n_test, len(texts) - n_train)], seed)
    return train, deduplicate(test, train)


def people_corpus(
    n_forget: int=64, # people to forget
    n_retain: int=320, # people the model may go on knowing
    seed: int=0, # draws the people and the split of the documentation
) -> Corpus:
    "Invented people to forget, others to retain, as many held out as forgotten, and documentation as general text."
    require(n_forget >= 1, "n_forget", f"{n_forget} people are asked for", "Ask for at least 1")
    require(n_retain >= 1, "n_retain", f"{n_retain} people are asked for", "Ask for at least 1")
    forget, retain, heldout = split(people(2*n_forget + n_retain, seed), [n_forget, n_retain, n_forget], seed)
    general_train, general_test = general_split(documentation_paragraphs(), 300, 100, seed)
    heldout = deduplicate(heldout, forget + retain + general_train)
    return Corpus("people", forget, retain, heldout, general_train, general_test)


ICU_FILES = "https://raw.githubusercontent.com/himalalps/ICU"
TOKEN_COMMIT, TEXT_COMMIT = "f9e06e470b654eb8eceab433f3e8ef42a1f538c7", "bb776e39de81ebcb53d1e7e51031960ec4f6842c"
# SHA-256 of every public file, as it stands at the commits above.
FORGET_SHA = ["7fa2b546f88f881ad377244774804713bc18ef2bb39f3c75065f8fbf2139fc59", "12a214573a08ccdaab698c7174be247d09896c6127991b60ad0d9682e10adcf2",
              "88d379f90bfdb1b7312300a58d1347e0aed4331367414f41048bcbe9ada8319a", "f9e921ce777fd7581f3742f02dfad5302a0246285f45a02cfbfe49be5112ecb6",
              "2cdcfcde773c1448a51828af10a58dae45b7e33015ec9d4be66a1443837f2560"]
NEIGHBOR_SHA = ["66777e62a6fd9841b76c267590282dcd2a1f309ca7fef3d37d74d7475548c98d", "be44c3ee41cb6cf0e6f46170e4121c56a1e4e72d35a7c692fb2b09b2fbcb57d0",
                "2a4efa9f46d90146608676bb96918d247d6661f3e1ecd257b6dc3d57ff07561b", "395e5e205b2c3605a3555c114f79041ce493c326e8d7771cd972ede597ca4d70",
                "5362cf11ee9172528da74706f1f6dedbf90a47855de647e8f16dcfd7bfda41a0"]
TEXT_SHA = {
    "dialogue/blended_skill_talk.json": "60c938c0f2f2f15d00a962a2df2163a9ce2d1511a90baacc68cb713d3b686766",
    "dialogue/empathetic_dialogues.json": "337ebfe6171f8732f114ea618febde30bb05bf2fa3aff259f452c9c5bbac65de",
    "dialogue/wizard_of_wikipedia.json": "e8d2d3332fe6abf59a567fa4a6cc9d7d8bfbebf0d38291519ef7a3df0df2e978",
    "perplexity/wikitext.csv": "cb85284acc5ce7e23706d69fc75da183c591da5a207c25c66490659dd88fcb0f",
}
# Name in a local data folder -> (public address, SHA-256).
PUBLIC_FILES = {
    **{f"pile_extraction/run{k}/forget_tokens.npy": (f"{ICU_FILES}/{TOKEN_COMMIT}/datasets/exp/exp{k}/unlearn/_dataset.npy", FORGET_SHA[k]) for k in range(5)},
    **{f"pile_extraction/run{k}/neighbour_tokens.npy": (f"{ICU_FILES}/{TOKEN_COMMIT}/datasets/exp/exp{k}/learn/_dataset.npy", NEIGHBOR_SHA[k]) for k in range(5)},
    **{name: (f"{ICU_FILES}/{TEXT_COMMIT}/datasets/validation_data/{Path(name).name}", sha) for name, sha in TEXT_SHA.items()},
}


def download(
    url: str, # a public address
    sha256: str, # the file's expected SHA-256, in hex
    path: str|Path, # where it goes
) -> Path:
    "Fetch a file once; what is not the expected file is refused and not kept."
    path = Path(path)
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} cannot be reached ({error}). Check the network, or put the file into a folder and name it with `data_dir` or ICU_NB_DATA.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DownloadError(f"{url} has SHA-256 {found[:12]}…, expected {sha256[:12]}…: it is not the published file. Nothing was kept; try again, or use a local copy with `data_dir`.")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def data_folder(
    data_dir: str|Path|None=None, # a local data folder; None: the environment variable ICU_NB_DATA, if set
) -> Path|None:
    "The local data folder, or None where files are to be downloaded."
    folder = data_dir or os.environ.get("ICU_NB_DATA") or None
    require(folder is None or Path(folder).is_dir(), "data_dir", f"{folder} is not a folder", "Name an existing folder, or leave it out to download")
    return None if folder is None else Path(folder)


def data_file(
    name: str, # a key of `PUBLIC_FILES`
    data_dir: str|Path|None=None, # see `data_folder`
) -> Path:
    "The path of a published file: from the local folder if one is named, else downloaded and checked."
    require(name in PUBLIC_FILES, "name", f"{name!r} is not known", f"Known: {', '.join(PUBLIC_FILES)}")
    folder = data_folder(data_dir)
    if folder is None:
        url, sha256 = PUBLIC_FILES[name]
        return download(url, sha256, cache_dir()/"data"/name)
    require((folder/name).exists(), "data_dir", f"{folder} holds no {name}", "Name a folder that does, or leave it out to download")
    return folder/name


def gpt2_tokenizer(
    data_dir: str|Path|None=None, # a folder with gpt2_tokenizer/vocab.json and merges.txt; else from the Hub
):
    "GPT-2's tokenizer, which GPT-Neo and the published token files use."
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    folder = data_folder(data_dir)
    if folder is None or not (folder/"gpt2_tokenizer").is_dir():
        try:
            return AutoTokenizer.from_pretrained("openai-community/gpt2")
        except OSError as error:
            raise DownloadError("GPT-2's tokenizer cannot be downloaded. Check the network, or put vocab.json and merges.txt into <data_dir>/gpt2_tokenizer.") from error
    # transformers 5 loads an empty vocabulary from these two files without a word; tokenizers reads them.
    bpe = ByteLevelBPETokenizer.from_file(str(folder/"gpt2_tokenizer"/"vocab.json"), str(folder/"gpt2_tokenizer"/"merges.txt"))
    bpe.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def pile_extraction(
    run: int=0, # which of the paper's five draws, 0 to 4
    data_dir: str|Path|None=None, # see `data_folder`
) -> datasets.Dataset:
    "The paper's own data: 128 rows of `input_ids` (200 GPT-2 tokens, to forget) and `neighbor_input_ids` (their published nearest neighbors)."
    require(run in range(5), "run", f"there is no run {run!r}", "Choose 0, 1, 2, 3 or 4")
    load = lambda part: np.load(data_file(f"pile_extraction/run{run}/{part}_tokens.npy", data_dir)).astype(np.int64)
    return datasets.Dataset.from_dict({"input_ids": load("forget"), "neighbor_input_ids": load("neighbour")})


def dialogues(
    data_dir: str|Path|None=None, # see `data_folder`
) -> list[str]:
    "Three of the paper's dialogue sets, one dialogue per text."
    files = [data_file(name, data_dir) for name in TEXT_SHA if name.startswith("dialogue/")]
    return [" ".join(" ".join(turns).split()) for file in files for turns in json.loads(file.read_text(encoding="utf-8"))["text"].values()]


def wikitext(
    data_dir: str|Path|None=None, # see `data_folder`
) -> list[str]:
    "The paper's WikiText validation texts."
    csv.field_size_limit(10**8)
    with open(data_file("perplexity/wikitext.csv", data_dir), newline="", encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file)]


def local_runs(
    data_dir: str|Path|None=None, # see `data_folder`
) -> list[int]:
    "The runs at hand: those in the local folder, or all five where files are downloaded."
    folder = data_folder(data_dir)
    return [k for k in range(5) if folder is None or (folder/f"pile_extraction/run{k}/neighbour_tokens.npy").exists()]


def pile_corpus(
    n_forget: int=64, # sequences to forget, at most 128
    run: int=0, # the run they are drawn from
    seed: int=0, # draws them, and splits the general text
    data_dir: str|Path|None=None, # see `data_folder`
) -> Corpus:
    "Real Pile sequences of one run to forget, all published neighbors at hand to retain, another run held out, dialogues and WikiText as general text."
    require(run in range(5), "run", f"there is no run {run!r}", "Choose 0, 1, 2, 3 or 4")
    require(n_forget in range(1, 129), "n_forget", f"{n_forget} sequences are asked for, and a run has 128", "Ask for 1 to 128")
    runs = local_runs(data_dir)
    require(len(set(runs) - {run}) > 0, "data_dir", "the held-out set needs a second run", "Add another folder pile_extraction/run<k>")
    tokenizer = gpt2_tokenizer(data_dir)
    decode = lambda part, k: tokenizer.batch_decode(pile_extraction(k, data_dir)[part][:])
    forget, = split(decode("input_ids", run), [n_forget], seed)
    retain = [text for k in runs for text in decode("neighbor_input_ids", k)]
    retain = [text for text in dict.fromkeys(retain) if text not in set(forget)]
    general_train, general_test = general_split(dialogues(data_dir) + wikitext(data_dir), 2500, 200, seed)
    candidates = [text for k in runs if k != run for text in decode("input_ids", k)]
    heldout = deduplicate(candidates, forget + retain + general_train)
    heldout, = split(heldout, [min(n_forget, len(heldout))], seed)
    return Corpus("pile", forget, retain, heldout, general_train, general_test, epochs=2, repeats=50)


def check_texts(
    texts, # what should be a list of texts
    argument: str="texts", # its name, for the message
) -> list[str]:
    "The texts as a list, or one clear error that says which of them cannot be used."
    require(not isinstance(texts, str), argument, "one string was given where a list is needed", "Put it in a list, [text]")
    require(isinstance(texts, Iterable), argument, f"{type(texts).__name__} is no list of texts", "Give a list of strings")
    texts = list(texts)
    require(len(texts) > 0, argument, "there are no texts", "Give at least one")
    bad = [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    require(not bad, argument, f"no text, or an empty one, at index {bad[:5]}", "Remove or mend these")
    return texts


def read_table(
    path: str|Path, # a .csv, .jsonl or .json file in UTF-8
) -> pd.DataFrame:
    "The rows of a file; every CSV cell stays the string it is (the name `None` is a name)."
    path = Path(path)
    if path.suffix == ".csv":
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    text = path.read_text(encoding="utf-8-sig")
    one_list = text.lstrip().startswith("[") # else one record per line
    return pd.DataFrame(json.loads(text) if one_list else [json.loads(line) for line in text.split("\n") if line.strip()])


def read_texts(
    source, # a list of strings, a `datasets.Dataset`, a data frame, or the path of a .csv, .jsonl, .json or .txt file
    column: str="text", # the column that holds the texts; a .txt file has one text per line
) -> list[str]:
    "Texts from any of the usual places."
    if isinstance(source, (str, Path)):
        path = Path(source)
        require(path.is_file(), "source", f"there is no file {path}", "Give the path of a .csv, .jsonl, .json or .txt file, or a list of strings")
        require(path.suffix in (".csv", ".jsonl", ".json", ".txt"), "source", f"files ending in {path.suffix!r} cannot be read", "Use .csv, .jsonl, .json or .txt")
        try:
            source = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()] if path.suffix == ".txt" else read_table(path)
        except ValueError as error: # not UTF-8, or not what the file's ending says
            raise InputError(f"`source`: {path.name} cannot be read as {path.suffix} in UTF-8 ({' '.join(str(error).split())}). Mend the file, or give a list of strings.") from error
    if isinstance(source, (datasets.Dataset, pd.DataFrame)):
        columns = list(source.column_names if isinstance(source, datasets.Dataset) else source.columns)
        require(column in columns, "column", f"there is no column {column!r} in {columns}", "Name the one that holds the texts")
        source = list(source[column])
    return check_texts(source, "source")


def file_corpus(
    source, # see `read_texts`
    n_forget: int=64, # texts to forget
    seed: int=0, # of the split
) -> Corpus:
    "Your own texts, split into forget, held-out (as many) and retain (the rest); the documentation is the general text."
    require(n_forget >= 1, "n_forget", f"{n_forget} texts are asked for", "Ask for at least 1")
    texts = list(dict.fromkeys(read_texts(source)))
    require(len(texts) >= 3*n_forget, "n_forget", f"{len(texts)} different texts are too few to forget {n_forget}", f"Give at least {3*n_forget} texts, or forget fewer")
    forget, heldout, retain = split(texts, [n_forget, n_forget, len(texts) - 2*n_forget], seed)
    general_train, general_test = general_split(documentation_paragraphs(), 300, 100, seed)
    heldout = deduplicate(heldout, forget + retain + general_train)
    require(len(heldout) > 0, "source", "every held-out text repeats a text that the model is trained on", "Give texts that differ more")
    return Corpus(Path(source).stem if isinstance(source, (str, Path)) else "texts", forget, retain, heldout, general_train, general_test)


def load_corpus(
    dataset: str="people", # "people", "pile", or the path of a file of texts
    n_forget: int=64, # texts to forget
    seed: int=0, # draws the corpus
    data_dir: str|Path|None=None, # see `data_folder`; used by "pile"
) -> Corpus:
    "A corpus by name."
    require(isinstance(n_forget, int) and n_forget > 0, "n_forget", f"{n_forget!r} is not a positive integer", "Give for example n_forget=64")
    if dataset == "people":
        return people_corpus(n_forget, seed=seed)
    if dataset == "pile":
        return pile_corpus(n_forget, seed=seed, data_dir=data_dir)
    require(Path(dataset).is_file(), "dataset", f"{dataset!r} is neither a known data set nor a file", 'Use "people", "pile" or the path of a .csv, .jsonl, .json or .txt file')
    return file_corpus(dataset, n_forget, seed)


@dataclass(frozen=True)
class Sequences:
    "Token sequences of one width, padded on the right."
    input_ids: torch.Tensor # LongTensor [n, T]
    attention_mask: torch.Tensor # LongTensor [n, T]; 1 for real tokens, which come first

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows) -> "Sequences": # rows: a slice, a list or a tensor of row numbers
        return Sequences(self.input_ids[rows], self.attention_mask[rows])

    @property
    def lengths(self) -> torch.Tensor: # LongTensor [n]: real tokens per row
        return self.attention_mask.sum(1)

    def to(self, device) -> "Sequences":
        return Sequences(self.input_ids.to(device), self.attention_mask.to(device))

    def tokens(self) -> list[list[int]]:
        "The real tokens of every row."
        return [row[:n].tolist() for row, n in zip(self.input_ids, self.lengths)]

    def batches(self, batch_size: int):
        "The rows in order, `batch_size` at a time."
        return (self[i:i + batch_size] for i in range(0, len(self), batch_size))


def pad(
    token_lists: list[list[int]], # the tokens of every sequence
    pad_token_id: int=0, # what fills the rest
    width: int|None=None, # the common width T, longer sequences are cut; None: the longest sequence
) -> Sequences:
    "Right-padded `Sequences`."
    width = width or max(map(len, token_lists), default=0)
    mask = torch.arange(width) < torch.tensor([len(tokens) for tokens in token_lists])[:, None]
    input_ids = torch.full(mask.shape, pad_token_id)
    input_ids[mask] = torch.tensor([t for tokens in token_lists for t in tokens[:width]], dtype=torch.long)
    return Sequences(input_ids, mask.long())


def tokenize(
    texts: list[str], # the texts
    tokenizer, # any Hugging Face tokenizer; what it puts in front (BOS) stays
    seq_len: int|None=None, # longer texts are cut here; None: nothing is cut
) -> Sequences:
    "Texts to right-padded token sequences."
    require(seq_len is None or seq_len >= 1, "seq_len", f"{seq_len!r} is no length", "Give a number of tokens, or None")
    texts = list(texts)
    encoded = tokenizer(texts, truncation=seq_len is not None, max_length=seq_len, padding=False)["input_ids"] if texts else []
    return pad(encoded, pad_id(tokenizer))


def pad_id(
    tokenizer, # any Hugging Face tokenizer
) -> int:
    "The token that fills the padding: the pad token, or end-of-sequence where there is none; the mask hides it either way."
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def prompt_suffix(
    sequences: Sequences, # n sequences
) -> tuple[list[list[int]], list[list[int]]]:
    "For every sequence of real length L its prompt, tokens L/2 to 3L/4, and its suffix, 3L/4 to L (100, 150 and 200 in the paper)."
    tokens = sequences.tokens()
    return [t[len(t)//2:3*len(t)//4] for t in tokens], [t[3*len(t)//4:] for t in tokens]
