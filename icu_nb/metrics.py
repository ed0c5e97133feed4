import inspect, logging, math, warnings
from collections import Counter
from contextlib import contextmanager

from icu_nb.core import InputError, best_device, require
from icu_nb.data import Sequences, check_texts, pad, tokenize
from icu_nb.models import token_losses
import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU
from transformers import AutoModel, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer


@contextmanager
def evaluating(
    model, # a torch module
):
    "No dropout and no gradients inside; the model is put back into its mode afterwards."
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def context_length(
    model, # a causal LM
) -> float:
    "How many tokens the model can take at once; infinity where its configuration names no limit."
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def real_tokens(
    input_ids: torch.Tensor, # LongTensor [n, T]
    attention_mask: torch.Tensor|None=None, # [n, T], padding on either side; None: no padding
    context: float=math.inf, # the longest sequence allowed
) -> Sequences:
    "The same sequences, padded on the right whatever side they were padded on; `InputError` when they cannot be scored."
    require(input_ids.ndim == 2 and len(input_ids) > 0, "input_ids", f"its shape is {list(input_ids.shape)}", "Give at least one sequence, as a tensor [n, T]")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    require(mask.shape == input_ids.shape, "attention_mask", f"its shape is {list(mask.shape)}, that of input_ids {list(input_ids.shape)}", "Give the mask that belongs to input_ids")
    rows = [ids[real.bool()].tolist() for ids, real in zip(input_ids.cpu(), mask.cpu())]
    long = [i for i, row in enumerate(rows) if len(row) > context]
    require(not long, "input_ids", f"sequences {long[:5]} are longer than the model's context of {context} tokens", "Cut them")
    return pad(rows)


class NonFinite(ArithmeticError):
    "A loss, a gradient or a model's answer is NaN or infinite."


def greedy_pass(
    model, # a causal LM
    batch: Sequences, # B sequences, on the model's device
    use_cache: bool=False, # keep keys and values for continuations
) -> tuple[torch.Tensor, object]: # LongTensor [B, T]: the greedy token at every position (column 0 means nothing); the cache
    "What the model would say at each position, given the true tokens before it: one teacher-forced pass."
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=use_cache)
    highest, token = output.logits[:, :-1].max(-1)
    if not highest[batch.attention_mask[:, :-1].bool()].isfinite().all():
        raise NonFinite("the model answers with NaN or infinite logits; its weights are of no use any more")
    greedy = torch.zeros_like(batch.input_ids)
    greedy[:, 1:] = token
    return greedy, output.past_key_values if use_cache else None


def el_positions(
    lengths: list[int], # real length of every sequence
    n: int=10, # n-gram size
    start: int|None=None, # the first offset; None: 3/4 of the real length
    argument: str="input_ids", # where the sequences come from, for messages
) -> list[int]:
    "The first offset of each sequence, or one clear error when EL_n is not defined there."
    require(isinstance(n, int) and n > 0, "n", f"{n!r} is not a positive integer", "The paper uses n=10")
    if start is None:
        short = [i for i, length in enumerate(lengths) if length < 4*n]
        require(not short, argument, f"sequences {short[:5]} have fewer than 4n = {4*n} tokens, too short for EL_{n}", "Use a smaller n or longer texts")
        return [3*length//4 for length in lengths]
    require(isinstance(start, int) and start >= 1, "start", f"{start!r} is not a positive integer", "Position 0 has nothing in front of it; start at 1 or later")
    short = [i for i, length in enumerate(lengths) if length - start < n]
    require(not short, "start", f"no {n}-gram fits behind position {start} in sequences {short[:5]}", "Use a smaller start or n, or longer texts")
    return [start]*len(lengths)


def overlap(
    continuation: list[int], # what the model says from an offset to the end
    truth: list[int], # what stands there; of the same length
    n: int=10, # n-gram size
) -> float:
    "OL_n: the share of the continuation's n-grams (with repetition) that occur in the truth."
    ngrams = lambda tokens: list(zip(*(tokens[i:] for i in range(n))))
    known, said = set(ngrams(truth)), ngrams(continuation)
    return sum(gram in known for gram in said) / len(said)


def needed_rollouts(
    tokens: list[int], # the true sequence
    greedy: list[int], # from `greedy_pass`
    start: int, # EL's first offset
    n: int=10, # n-gram size
) -> list[int]:
    "The offsets whose greedy token is wrong and whose continuation EL_n needs."
    last = len(tokens) - n # the last offset that can hold an n-gram
    misses = [i for i in range(start, len(tokens)) if greedy[i] != tokens[i]]
    # A recitation that reaches `last` ends at the first miss from there on: later ones are never met.
    return [i for i in misses if i < last] + [i for i in misses if i >= last][:1]


def el_from_rollouts(
    tokens: list[int], # the true sequence
    rollouts: dict[int, list[int]], # needed offset -> greedy continuation from there to the end
    start: int, # EL's first offset
    n: int=10, # n-gram size
) -> float:
    "EL_n of one sequence: where the greedy token is right, continuing from i is continuing from i+1."
    continuation, overlaps = [], []
    for i in reversed(range(start, len(tokens))):
        continuation = rollouts[i] if i in rollouts else [tokens[i], *continuation]
        if len(tokens) - i >= n:
            overlaps.append(overlap(continuation, tokens[i:], n))
    return sum(overlaps) / len(overlaps)


def gather_prefixes(
    cache, # the transformers cache of B teacher-forced sequences
    rows: torch.Tensor, # LongTensor [R]: which sequence each continuation belongs to
    offsets: torch.Tensor, # LongTensor [R]: how many of its tokens come before the continuation
) -> DynamicCache: # keys and values of R prefixes, all ending in the same slot
    "Copy prefixes out of a shared cache; the gap stands at the left, so distances between slots are distances between tokens."
    width = int(offsets.max())
    slots = (torch.arange(width, device=offsets.device) - (width - offsets)[:, None]).clamp(min=0)
    pick = lambda state: state.transpose(1, 2)[rows[:, None], slots].transpose(1, 2)
    return DynamicCache([(pick(layer.keys), pick(layer.values)) for layer in cache.layers])


def continue_from_cache(
    model, # a causal LM
    cache, # the cache of the teacher-forced batch
    rows: torch.Tensor, # LongTensor [R]: rows of that batch
    offsets: torch.Tensor, # LongTensor [R]: where each continuation starts
    first: torch.Tensor, # LongTensor [R]: its first token
    steps: list[int], # how many tokens each continuation gets, longest first
) -> list[list[int]]: # R continuations
    "R greedy continuations at once, none of whose prefixes is computed again."
    prefixes, width = gather_prefixes(cache, rows, offsets), int(offsets.max())
    mask = (torch.arange(width, device=offsets.device) >= (width - offsets)[:, None]).long()
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    said = [[token] for token in first.tolist()]
    for step in range(1, steps[0]):
        alive = sum(n > step for n in steps)
        if alive < len(first):
            prefixes.batch_select_indices(torch.arange(alive, device=offsets.device))
        mask = F.pad(mask[:alive], (0, 1), value=1)
        positions = {"position_ids": (offsets[:alive] + step - 1)[:, None]} if takes_positions else {}
        output = model(input_ids=first[:alive, None], attention_mask=mask, past_key_values=prefixes, use_cache=True, **positions)
        first = output.logits[:, -1].argmax(-1)
        for tokens, token in zip(said, first.tolist()):
            tokens.append(token)
    return said


def continue_plainly(
    model, # a causal LM
    prefixes: list[list[int]], # what each continuation follows
    steps: list[int], # how many tokens each continuation gets, longest first
) -> list[list[int]]: # R continuations
    "The same without a cache that can be copied: every token reads its whole prefix again."
    tokens = [list(prefix) for prefix in prefixes]
    for step in range(steps[0]):
        alive = [row for row, n in zip(tokens, steps) if n > step]
        batch = pad(alive).to(model.device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        for row, token in zip(alive, logits[torch.arange(len(alive)), batch.lengths - 1].argmax(-1).tolist()):
            row.append(token)
    return [row[len(prefix):] for row, prefix in zip(tokens, prefixes)]


def can_copy(
    cache, # what the model returned as `past_key_values`
) -> bool:
    "Whether the cache is the plain transformers cache, whose slots are tokens."
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def chunks_that_fit(
    jobs: list[tuple[int, int, int]], # (row, offset, steps)
    batch_size: int, # jobs per chunk
    context: float, # how many slots the model's cache may have
) -> list[list[tuple[int, int, int]]]: # the jobs, longest first within a chunk
    "Jobs of like offset together; no chunk needs more slots than its latest offset plus its longest continuation may take."
    chunks = []
    for job in sorted(jobs, key=lambda job: (job[1], -job[2])):
        if not chunks or len(chunks[-1]) == batch_size or job[1] + max(steps for *_, steps in [*chunks[-1], job]) > context:
            chunks.append([])
        chunks[-1].append(job)
    return [sorted(chunk, key=lambda job: -job[2]) for chunk in chunks]


def roll_out(
    model, # a causal LM
    batch: Sequences, # B sequences on the model's device
    greedy: torch.Tensor, # from `greedy_pass`
    cache, # from `greedy_pass`
    needed: list[list[int]], # the offsets to continue from, per sequence
    batch_size: int=32, # continuations at a time
) -> list[dict[int, list[int]]]: # per sequence: offset -> continuation to the sequence's end
    "Greedy continuations from all needed offsets, many at a time."
    lengths, device = batch.lengths.tolist(), batch.input_ids.device
    jobs = [(row, i, lengths[row] - i) for row, offsets in enumerate(needed) for i in offsets]
    if jobs and not can_copy(cache):
        warnings.warn(f"{type(model).__name__} has no cache that can be copied: continuations are computed the plain, slow way.", stacklevel=2)
    rollouts = [{} for _ in needed]
    for chunk in chunks_that_fit(jobs, batch_size, context_length(model)):
        steps = [n for *_, n in chunk]
        if can_copy(cache):
            rows, offsets, _ = torch.tensor(chunk, device=device).T
            said = continue_from_cache(model, cache, rows, offsets, greedy[rows, offsets], steps)
        else:
            said = continue_plainly(model, [batch.input_ids[row, :i].tolist() for row, i, _ in chunk], steps)
        for (row, i, _), tokens in zip(chunk, said):
            rollouts[row][i] = tokens
    return rollouts


def memorization_accuracy(
    model, # a causal LM
    input_ids: torch.Tensor, # LongTensor [n, T]
    attention_mask: torch.Tensor|None=None, # [n, T], padding on either side; None: no padding
    *,
    batch_size: int=32, # sequences per forward pass
) -> torch.Tensor: # float Tensor [n] in [0, 1], on the CPU
    "MA: the share of a sequence's tokens, the first left out, that the model ranks first given the true tokens before (KUMPR, eq. 3)."
    sequences, scores = real_tokens(input_ids, attention_mask, context_length(model)), []
    with evaluating(model):
        for batch in sequences.batches(batch_size):
            batch = batch.to(model.device)
            greedy, _ = greedy_pass(model, batch)
            scores.append(matches(greedy, batch))
    return torch.cat(scores)


def matches(
    greedy: torch.Tensor, # from `greedy_pass`
    batch: Sequences, # the same batch
) -> torch.Tensor: # float Tensor [B], on the CPU
    "The share of real tokens after the first that are the greedy ones; 0 for a sequence of one token."
    real = batch.attention_mask[:, 1:].bool()
    hits = ((greedy == batch.input_ids)[:, 1:] & real).sum(1)
    return (hits.double() / real.sum(1).clamp(min=1)).cpu()


def memorization(
    model, # a causal LM
    input_ids: torch.Tensor, # LongTensor [n, T]
    attention_mask: torch.Tensor|None=None, # [n, T], padding on either side; None: no padding
    *,
    n: int=10, # n-gram size
    start: int|None=None, # EL's first offset; None: 3/4 of the real length
    batch_size: int=32, # sequences per forward pass; four times as many continuations
) -> tuple[torch.Tensor, torch.Tensor]: # MA and EL_n: float Tensors [n] in [0, 1], on the CPU
    "MA and EL_n from one teacher-forced pass, with continuations only where the greedy token is wrong."
    sequences = real_tokens(input_ids, attention_mask, context_length(model))
    starts = el_positions(sequences.lengths.tolist(), n, start)
    accuracy, likelihood = [], []
    with evaluating(model):
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first:first + batch_size].to(model.device)
            greedy, cache = greedy_pass(model, batch, use_cache=True)
            accuracy.append(matches(greedy, batch))
            tokens, own_starts = batch.tokens(), starts[first:first + batch_size]
            needed = [needed_rollouts(*row, n) for row in zip(tokens, greedy.tolist(), own_starts)]
            rollouts = roll_out(model, batch, greedy, cache, needed, 4*batch_size)
            likelihood += [el_from_rollouts(*row, n) for row in zip(tokens, rollouts, own_starts)]
    return torch.cat(accuracy), torch.tensor(likelihood, dtype=torch.float64)


def extraction_likelihood(
    model, # a causal LM
    input_ids: torch.Tensor, # LongTensor [n, T]
    attention_mask: torch.Tensor|None=None, # [n, T], padding on either side; None: no padding
    *,
    n: int=10, # n-gram size
    start: int|None=None, # the first offset; None: 3/4 of the real length (150 of 200 in ICU; KUMPR uses 1)
    batch_size: int=32, # sequences per forward pass
) -> torch.Tensor: # float Tensor [n] in [0, 1], on the CPU
    "EL_n: how many n-grams of the true rest a greedy continuation says, averaged over where it starts (KUMPR, eq. 2)."
    return memorization(model, input_ids, attention_mask, n=n, start=start, batch_size=batch_size)[1]


logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it recommends another variant than the one defined here
_bleu = BLEU(smooth_method="none", lowercase=True, effective_order=False)


def sentence_bleu(
    continuations: list[str], # what the model said
    references: list[str], # what stands there
) -> np.ndarray: # float array [n] in [0, 1]
    "BLEU-4 per sentence, lower case, unsmoothed: 0 unless some four words in a row are shared (sacrebleu)."
    return np.array([_bleu.sentence_score(said, [truth]).score/100 for said, truth in zip(continuations, references, strict=True)])


class BERTScorer:
    "BERTScore F1 with a local encoder, loaded once (torchmetrics; raw, its last layer)."
    def __init__(self,
        encoder: str, # name or folder of a Hugging Face encoder; bert-base-uncased where nothing else is said
    ):
        from torchmetrics.text.bert import BERTScore
        try:
            tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
        except (OSError, ValueError) as error:
            raise InputError(f"`encoder`: {str(encoder)!r} cannot be loaded. Name a folder made by save_pretrained, or check the name and the network. ({str(error).splitlines()[0]})") from error
        longest = min(512, tokenizer.model_max_length, context_length(model))
        to_tensors = lambda texts, max_length: tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        self.metric = BERTScore(model=model, user_tokenizer=to_tensors, max_length=longest, device=best_device())

    def __call__(self,
        continuations: list[str], # what the model said
        references: list[str], # what stands there
    ) -> np.ndarray: # float array [n]; 0 where one of the two is empty
        # One pair at a time: torchmetrics 1.9 sorts a list by length and does not put it back in order.
        return np.array([self.one(*pair) for pair in zip(continuations, references, strict=True)])

    def one(self, continuation: str, reference: str) -> float:
        "F1 of one pair."
        if not (continuation.strip() and reference.strip()):
            return 0.0
        self.metric.reset()
        self.metric.update([continuation], [reference])
        return float(self.metric.compute()["f1"])


def token_entropy(
    tokens: list[int], # a generated continuation
) -> float:
    "Shannon entropy, in bits, of the token frequencies: low for a continuation that repeats itself."
    shares = [count/len(tokens) for count in Counter(tokens).values()]
    return -sum(p*math.log2(p) for p in shares) + 0.0


def distinct_n(
    tokens: list[int], # a generated continuation
    n: int=1, # n-gram size
) -> float:
    "Different n-grams over all n-grams, in (0, 1]; 0 when there is none."
    ngrams = list(zip(*(tokens[i:] for i in range(n))))
    return len(set(ngrams))/len(ngrams) if ngrams else 0.0


def perplexity(
    model, # a causal LM
    tokenizer, # its tokenizer
    texts: list[str], # the texts
    *,
    max_length: int=512, # tokens; longer texts are cut, to the model's context at most
    batch_size: int=8, # texts per forward pass
) -> float:
    "exp of the mean negative log-likelihood per token, over all tokens of all texts (not a mean of means)."
    sequences = tokenize(check_texts(texts), tokenizer, min(max_length, context_length(model)))
    total, count = 0.0, 0
    with evaluating(model):
        for batch in sequences.batches(batch_size):
            batch = batch.to(model.device)
            nll, real = token_losses(model(**vars(batch)).logits, **vars(batch))
            total, count = total + nll.sum().item(), count + int(real.sum())
    require(count > 0, "texts", "no text has two tokens, so there is nothing to predict", "Give longer texts")
    return float(torch.tensor(total/count, dtype=torch.float64).exp())
