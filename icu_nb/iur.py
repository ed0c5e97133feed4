import math
from dataclasses import dataclass
import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, StoppingCriteria
from icu_nb.core import InputError, require, require_number
from icu_nb.data import Sequences, check_texts, pad_id, prompt_suffix, tokenize
from icu_nb.metrics import distinct_n, el_positions, memorization, sentence_bleu, token_entropy


@dataclass(frozen=True)
class Thresholds:
    "When a sequence counts as forgotten (bleu, bert_f1, rule), and when training may stop (ma, el)."
    bleu: float=0.01 # forgotten when BLEU is under it (the paper's b)
    bert_f1: float=0.3 # or when BERTScore F1 is under it (the paper's a)
    rule: str="any" # "any": one of the two is enough, as in the authors' code; "all": both
    ma: float=0.2994 # stop when the mean MA is at or under it and ...
    el: float=0.0499 # ... the mean EL is at or under it

    def __post_init__(self):
        for name in ("bleu", "bert_f1", "ma", "el"):
            require_number(name, getattr(self, name), high=1.0)
        require(self.rule in ("any", "all"), "rule", f"{self.rule!r} is not known", 'Use "any" or "all"')

    @classmethod
    def kumpr(cls) -> "Thresholds":
        "KUMPR's figures for GPT-Neo 125M (EL with start 1), which ICU's code used until May 2024."
        return cls()

    @classmethod
    def icu(cls) -> "Thresholds":
        "The figures of ICU's public code since then: MA 0.5994, EL 0.0499."
        return cls(ma=0.5994)


def calibrate_thresholds(
    model, # the original model
    tokenizer, # its tokenizer
    heldout: list[str], # texts of the forget set's kind that the model never saw
    *,
    seq_len: int|None=None, # longer texts are cut
    n: int=10, # EL's n-gram size
    start: int|None=None, # EL's first offset; None: 3/4 of the real length
    el_floor: float=0.0, # EL's threshold is at least this
    batch_size: int=32, # sequences per forward pass
) -> Thresholds:
    "The mean MA and EL of texts never seen: a model that scores no higher on the forget set treats it as unseen."
    require_number("el_floor", el_floor, high=1.0)
    sequences = tokenize(check_texts(heldout, "heldout"), tokenizer, seq_len)
    el_positions(sequences.lengths.tolist(), n, start, "heldout")
    accuracy, likelihood = memorization(model, sequences.input_ids, sequences.attention_mask, n=n, start=start, batch_size=batch_size)
    return Thresholds(ma=accuracy.mean().item(), el=max(likelihood.mean().item(), el_floor))


class OwnLength(StoppingCriteria):
    "Ends every sequence of a batch at its own length, whatever the others need."
    def __init__(self,
        totals: torch.Tensor, # LongTensor [B]: prompt width plus own suffix length
    ):
        self.totals = totals

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        rows_each = len(input_ids) // len(self.totals) # beam search asks about several candidates per sequence
        return input_ids.shape[1] >= self.totals.to(input_ids.device).repeat_interleave(rows_each)


@torch.no_grad()
def continuations(
    model, # a causal LM
    prompts: list[list[int]], # the tokens to continue
    lengths: list[int], # how many tokens each continuation gets
    *,
    pad_token_id: int=0, # fills the left of shorter prompts, masked
    num_beams: int=2, # beam width; the authors use 2
    batch_size: int=32, # prompts at a time
) -> list[list[int]]:
    "Beam-search continuations of exactly the given lengths; end-of-sequence is an ordinary token."
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model # peft keeps the settings in the model it wraps
    own_config, owner.generation_config = owner.generation_config, GenerationConfig() # no end token, no penalties
    said = []
    try:
        for k in range(0, len(prompts), batch_size):
            chunk, wanted = prompts[k:k + batch_size], torch.tensor(lengths[k:k + batch_size])
            width = max(map(len, chunk))
            ids = torch.tensor([[pad_token_id]*(width - len(p)) + p for p in chunk])
            mask = torch.tensor([[0]*(width - len(p)) + [1]*len(p) for p in chunk])
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False, num_beams=num_beams, early_stopping=num_beams > 1,
                max_new_tokens=int(wanted.max()), pad_token_id=pad_token_id, stopping_criteria=[OwnLength(width + wanted)])
            said += [row[width:width + n] for row, n in zip(output.tolist(), wanted.tolist())]
    finally:
        owner.generation_config = own_config
    return said


def check(
    model, # a causal LM
    tokenizer, # its tokenizer
    sequences: Sequences, # the forget set
    *,
    n: int=10, # EL's n-gram size
    start: int|None=None, # EL's first offset; None: 3/4 of the real length
    scorer=None, # a `BERTScorer`; None: BLEU alone decides
    num_beams: int=2, # of the continuations
    batch_size: int=32, # sequences per forward pass
) -> pd.DataFrame: # a row per sequence: id, ma, el, bleu, bert_f1, entropy, distinct, continuation
    "IUR's look at every forget sequence: what does the model still know of it?"
    accuracy, likelihood = memorization(model, sequences.input_ids, sequences.attention_mask, n=n, start=start, batch_size=batch_size)
    prompts, suffixes = prompt_suffix(sequences)
    said = continuations(model, prompts, [len(s) for s in suffixes], pad_token_id=pad_id(tokenizer), num_beams=num_beams, batch_size=batch_size)
    texts, truths = tokenizer.batch_decode(said), tokenizer.batch_decode(suffixes)
    return pd.DataFrame({
        "id": range(len(sequences)), "ma": accuracy.numpy(), "el": likelihood.numpy(), "bleu": sentence_bleu(texts, truths),
        "bert_f1": scorer(texts, truths) if scorer else math.nan, "entropy": [token_entropy(t) for t in said],
        "distinct": [distinct_n(t) for t in said], "continuation": texts})


def is_forgotten(
    scores: pd.DataFrame, # from `check`
    thresholds: Thresholds, # bleu, bert_f1 and rule are used
) -> np.ndarray: # bool [n]
    "Which sequences count as forgotten: BLEU or (rule 'all': and) BERTScore F1 under its threshold; without an encoder BLEU alone."
    bleu = (scores["bleu"] < thresholds.bleu).to_numpy()
    if scores["bert_f1"].isna().all():
        return bleu
    bert = (scores["bert_f1"] < thresholds.bert_f1).to_numpy()
    return bleu | bert if thresholds.rule == "any" else bleu & bert


def thresholds_met(
    scores: pd.DataFrame, # from `check`
    thresholds: Thresholds, # ma and el are used
) -> bool:
    "Whether the mean MA and the mean EL are both at or under their thresholds."
    return bool(scores["ma"].mean() <= thresholds.ma and scores["el"].mean() <= thresholds.el)


def select_active(
    scores: pd.DataFrame, # from `check`
    thresholds: Thresholds, # all are used
) -> np.ndarray: # bool [n]
    "Who trains next: whoever is not forgotten; if nobody is left, whoever's own MA or EL is still over its threshold."
    active = ~is_forgotten(scores, thresholds)
    if not active.any():
        active = ((scores["ma"] > thresholds.ma) | (scores["el"] > thresholds.el)).to_numpy()
    return active
