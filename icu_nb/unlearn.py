import math, time, warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from icu_nb.core import mixed_precision, require, require_number, seed_everything
from icu_nb.data import Sequences, check_texts, pad, pad_id, tokenize
from icu_nb.metrics import BERTScorer, NonFinite, el_positions, extraction_likelihood, memorization_accuracy
from icu_nb.kui import unlearning_loss
from icu_nb.cle import OriginalModel, kl_loss, model_embedder, nearest_neighbors, pair_learning_loss, second_half, sentence_embedder
from icu_nb.iur import Thresholds, check, is_forgotten, select_active, thresholds_met
import datasets
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm


@dataclass(frozen=True)
class ICUConfig:
    "The settings of a run; the defaults are the paper's."
    alpha: float=0.5 # weight of L_lrn
    beta: float=1.0 # weight of L_kl
    lr: float=5e-6 # Adam's learning rate
    batch_size: int=8 # forget sequences per step
    max_epochs: int=50 # stop here at the latest
    seed: int=0 # of the order of the sequences
    seq_len: int|None=None # longer texts are cut to this many tokens; None: nothing is cut (200 in the paper)
    n: int=10 # EL's n-gram size
    start: int|None=None # EL's first offset; None: 3/4 of the real length
    n_neighbors: int=1 # neighbors per forget text
    max_overlap: float=0.5 # nearer neighbors, by shared 10-grams, are passed over
    max_grad_norm: float=1.0 # gradients are clipped to this norm
    num_beams: int=2 # of IUR's continuations
    stop: str="thresholds" # "all_forgotten": also when no sequence is left, as the authors do
    check_steps: int|None=None # also test the thresholds after every so many steps within an epoch
    eval_batch_size: int=32 # sequences per forward pass where nothing is trained

    def __post_init__(self):
        for name in ("alpha", "beta", "lr", "max_grad_norm"):
            require_number(name, getattr(self, name))
        require_number("max_overlap", self.max_overlap, high=1.0)
        for name in ("batch_size", "max_epochs", "n", "n_neighbors", "num_beams", "eval_batch_size"):
            require(isinstance(value := getattr(self, name), int) and value >= 1, name, f"{value!r} is not a positive integer", "Give 1 or more")
        for name in ("seq_len", "start", "check_steps"):
            require((value := getattr(self, name)) is None or isinstance(value, int) and value >= 1, name, f"{value!r} is neither None nor a positive integer", "Give None, or 1 or more")
        require(isinstance(self.seed, int) and self.seed >= 0, "seed", f"{self.seed!r} is not a non-negative integer", "Give for example seed=0")
        require(self.stop in ("thresholds", "all_forgotten"), "stop", f"{self.stop!r} is not known", 'Use "thresholds" or "all_forgotten"')


@dataclass(frozen=True)
class Part:
    "One half of a batch: sequences, and which rows of the whole they are."
    name: str # "forget" or "neighbor"
    rows: torch.Tensor # LongTensor [B]
    input_ids: torch.Tensor # LongTensor [B, T]
    attention_mask: torch.Tensor # LongTensor [B, T]


@dataclass(frozen=True)
class Batch:
    "What an objective sees at every step."
    forget: Part # B sequences to unlearn
    neighbor: Part # their B·k neighbors

    def logits(self,
        model, # the model in training
    ) -> tuple[torch.Tensor, torch.Tensor]: # [B, T, V] for the forget part, [B·k, T, V] for the neighbors
        "The model's answer to both parts, in one forward pass."
        both = [torch.cat([getattr(self.forget, name), getattr(self.neighbor, name)]) for name in ("input_ids", "attention_mask")]
        logits = model(input_ids=both[0], attention_mask=both[1]).logits
        return logits.split([len(self.forget.rows), len(self.neighbor.rows)])


@dataclass(frozen=True)
class ICU:
    "The paper's objective: KUI on the forget sequences, CLE on their neighbors."
    alpha: float=0.5 # weight of L_lrn
    beta: float=1.0 # weight of L_kl
    remembers: ClassVar = ("neighbor",) # the parts about which the original model is asked

    def __call__(self, model, batch: Batch, reference: OriginalModel) -> dict[str, torch.Tensor]:
        forget, neighbor = batch.forget, batch.neighbor
        forget_logits, neighbor_logits = batch.logits(model)
        original = reference.logits("neighbor", neighbor.rows)
        return {
            "l_fgt": unlearning_loss(forget_logits, forget.input_ids, forget.attention_mask),
            "l_lrn": self.alpha * pair_learning_loss(neighbor_logits, neighbor.input_ids, neighbor.attention_mask),
            "l_kl": self.beta * kl_loss(neighbor_logits, original, neighbor.attention_mask)}


def gradient_ascent(model, batch: Batch, reference: OriginalModel) -> dict[str, torch.Tensor]:
    "KUI alone: the plain method that ICU sets out to tame."
    part = batch.forget
    logits = model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
    return {"l_fgt": unlearning_loss(logits, part.input_ids, part.attention_mask)}


@dataclass
class UnlearnResult:
    "What came of a run."
    model: torch.nn.Module # the model, changed in place
    history: pd.DataFrame # a row per epoch, 0 before training
    samples: pd.DataFrame # a row per forget sequence and epoch
    config: ICUConfig # its settings
    stop_reason: str # thresholds, all_forgotten, nothing_to_forget, max_epochs, interrupted or non_finite_loss
    thresholds: Thresholds # the thresholds it used
    pairs: np.ndarray # IntArray [n, k]: each forget text's neighbors in `retain` as it was given
    message: str # the stop reason as a sentence


def as_texts(
    source, # a list of strings, or a `datasets.Dataset` with a `text` or an `input_ids` column
    tokenizer, # turns tokens back into texts
    argument: str, # "forget" or "retain", for messages
) -> tuple[list[str], list[list[int]]|None]: # the texts, and their tokens where they were given
    "Texts, and tokens if the source has them."
    if not isinstance(source, datasets.Dataset):
        return check_texts(source, argument), None
    require(bool({"text", "input_ids"} & set(source.column_names)), argument, f"the data set has the columns {source.column_names}", "Give it a `text` or an `input_ids` column")
    if "input_ids" in source.column_names:
        tokens = [list(row) for row in source["input_ids"]]
        require(len(tokens) > 0 and all(tokens), argument, "there are no sequences, or an empty one", "Give at least one, and none that is empty")
        unknown = [i for i, row in enumerate(tokens) if min(row) < 0 or max(row) >= len(tokenizer)]
        require(not unknown, argument, f"the sequences at {unknown[:5]} hold tokens that the tokenizer does not know", "Give the tokenizer that made them")
        return tokenizer.batch_decode(tokens), tokens
    return check_texts(source["text"], argument), None


def to_tokens(
    texts: list[str], # from `as_texts`
    tokens: list[list[int]]|None, # from `as_texts`
    tokenizer, # its tokenizer
    seq_len: int|None, # longer sequences are cut
) -> list[list[int]]:
    "Token lists, cut to `seq_len`."
    tokens = tokenize(texts, tokenizer).tokens() if tokens is None else tokens
    return [row[:seq_len] for row in tokens]


def as_trained(
    texts: list[str], # whole texts
    tokens: list[list[int]], # their tokens, cut
    tokenizer, # turns tokens back into texts
) -> list[str]: # the texts up to the cut: neighbors are chosen by what is trained on
    "What is left of the texts once they are cut; a text of which only blanks would be left stays whole."
    return [cut if cut.strip() else text for text, cut in zip(texts, tokenizer.batch_decode(tokens, skip_special_tokens=True))]


def check_fit(
    model, # the model
    tokenizer, # said to be its tokenizer
    tokens: list[list[int]], # the forget sequences
    config: ICUConfig, # n, start and seq_len are used
) -> None:
    "One clear error when model, tokenizer and texts do not go together."
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max(len(tokenizer) - 1, *map(max, tokens))
    require(largest < vocabulary, "tokenizer", f"it makes tokens up to {largest}, and the model knows {vocabulary}", "Use the tokenizer that belongs to the model")
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    long = [i for i, row in enumerate(tokens) if len(row) > context]
    require(not long, "forget", f"texts {long[:5]} are longer than the model's context of {context} tokens", f"Set seq_len={context} in the config, or cut the texts")
    el_positions([len(row) for row in tokens], config.n, config.start, "forget")
    require(any(p.requires_grad for p in model.parameters()), "model", "none of its parameters is trainable", "Set requires_grad on those that shall change")
    if tokenizer.pad_token_id is None:
        warnings.warn(f"The tokenizer has no pad token; {tokenizer.eos_token!r} (end of sequence) fills the padding, which is masked everywhere.", stacklevel=4)


@dataclass(frozen=True)
class Task:
    "A run's sequences, and who is whose neighbor."
    forget: Sequences # n sequences
    neighbors: Sequences # n·k sequences; those of row i stand at i·k ... i·k + k-1
    pairs: np.ndarray # IntArray [n, k], indices into `retain` as it was given

    def batch(self,
        rows: torch.Tensor, # LongTensor [B]: rows of the forget set
        device, # where the batch goes
    ) -> Batch:
        "The forget sequences `rows` with all their neighbors."
        k = self.pairs.shape[1]
        part = lambda name, sequences, rows: Part(name, rows, **vars(sequences[rows].to(device)))
        return Batch(part("forget", self.forget, rows), part("neighbor", self.neighbors, (rows[:, None]*k + torch.arange(k)).flatten()))


def prepare_task(
    model, # the model, not changed here
    tokenizer, # its tokenizer
    forget, # see `unlearn`
    retain, # see `unlearn`
    config: ICUConfig, # the settings
    embedder: str|Callable|None=None, # see `unlearn`
) -> Task:
    "Check the input, then tokenize it and find the neighbors."
    (forget_texts, forget_tokens), (retain_texts, retain_tokens) = as_texts(forget, tokenizer, "forget"), as_texts(retain, tokenizer, "retain")
    forget_tokens = to_tokens(forget_texts, forget_tokens, tokenizer, config.seq_len)
    check_fit(model, tokenizer, forget_tokens, config)
    width = max(map(len, forget_tokens))
    retain_tokens = to_tokens(retain_texts, retain_tokens, tokenizer, width)
    forget_texts, retain_texts = as_trained(forget_texts, forget_tokens, tokenizer), as_trained(retain_texts, retain_tokens, tokenizer)
    kept = keep_apart(forget_texts, retain_texts)
    require(len(kept) >= config.n_neighbors, "retain", f"{len(kept)} texts are left, fewer than n_neighbors={config.n_neighbors}", "Give more retain texts, or a smaller n_neighbors")
    embedder = sentence_embedder(embedder) if isinstance(embedder, str) else embedder or model_embedder(model, tokenizer)
    found = nearest_neighbors(forget_texts, [retain_texts[j] for j in kept], embedder=second_half(embedder, tokenizer), k=config.n_neighbors, max_overlap=config.max_overlap)
    pairs = np.array(kept)[found]
    neighbor_tokens = [retain_tokens[j] for j in pairs.flatten()]
    return Task(pad(forget_tokens, pad_id(tokenizer), width), pad(neighbor_tokens, pad_id(tokenizer), width), pairs)


def keep_apart(
    forget: list[str], # texts to unlearn
    retain: list[str], # texts that may stay
) -> list[int]: # the indices of the retain texts that are not to be forgotten
    "A text cannot be both: whatever stands in `forget` is taken out of `retain`, with a warning."
    to_forget = set(forget)
    both = [j for j, text in enumerate(retain) if text in to_forget]
    if both:
        warnings.warn(f"`retain`: the texts at {both[:5]}{' and more' if len(both) > 5 else ''} also stand in `forget`; they are left out of `retain`.", stacklevel=4)
    return [j for j in range(len(retain)) if retain[j] not in to_forget]


def train_epoch(
    model, # the model in training
    optimizer, # its optimizer
    accelerator: Accelerator, # owns device and precision
    objective: Callable, # (model, batch, reference) -> named loss terms
    reference: OriginalModel, # the original model
    task: Task, # the sequences
    rows: torch.Tensor, # LongTensor: the active rows, in the order of this epoch
    config: ICUConfig, # batch_size, max_grad_norm and check_steps are used
    enough: Callable[[], bool], # whether the thresholds are met; asked every `check_steps` steps
) -> dict[str, float]: # the mean of every loss term over the sequences trained on
    "One pass over the active sequences."
    sums, seen = {}, 0
    for step, chosen in enumerate(rows.split(config.batch_size), start=1):
        terms = objective(model, task.batch(chosen, accelerator.device), reference)
        loss = sum(terms.values())
        if not torch.isfinite(loss):
            raise NonFinite(f"the loss is {loss.item()} in batch {step}; the model is as it was before that step")
        optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise NonFinite(f"the gradient is {norm.item()} in batch {step}; the model is as it was before that step")
        optimizer.step()
        seen += len(chosen)
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0.0) + value.item()*len(chosen)
        if config.check_steps and step % config.check_steps == 0 and enough():
            break
    return {name: value/seen for name, value in sums.items()}


MESSAGES = {
    "thresholds": "mean MA and mean EL are both at or under their thresholds",
    "all_forgotten": "no sequence is left to train on",
    "nothing_to_forget": "the model met the stop rule before the first epoch and was not changed",
    "max_epochs": "max_epochs was reached before the thresholds",
    "interrupted": "interrupted by the user; the model is what was reached by then",
}


def stop_reason(
    scores: pd.DataFrame, # from `iur.check`
    active: np.ndarray, # bool [n]: who would train next
    thresholds: Thresholds, # the thresholds
    config: ICUConfig, # stop and max_epochs are used
    epoch: int, # epochs done
) -> str|None:
    "Why to stop now, or None."
    if thresholds_met(scores, thresholds):
        return "thresholds" if epoch else "nothing_to_forget"
    if not active.any() or config.stop == "all_forgotten" and is_forgotten(scores, thresholds).all():
        return "all_forgotten" if epoch else "nothing_to_forget"
    return "max_epochs" if epoch >= config.max_epochs else None


def unlearn(
    model, # a Hugging Face causal LM; changed in place
    tokenizer, # its tokenizer
    forget, # texts to unlearn: a list of strings, or a `datasets.Dataset` with a `text` or an `input_ids` column
    retain, # texts that may stay, in which neighbors are looked for: the same forms
    config: ICUConfig=ICUConfig(), # the settings
    *,
    objective: Callable|None=None, # (model, batch, reference) -> named loss terms, whose sum is minimized; None: `ICU(alpha, beta)`
    refinement: Callable|None=select_active, # (scores, thresholds) -> who trains next; None: everybody, always
    thresholds: Thresholds|None=None, # when a text is forgotten and when to stop; None: the published `Thresholds()`
    embedder: str|Callable|None=None, # a sentence-transformers name or folder, or texts -> array [n, D]; None: the model's own hidden states
    encoder: str|None=None, # name or folder of an encoder for BERTScore; None: BLEU alone decides
) -> UnlearnResult:
    "Make `model` forget texts: train on those it still knows, check after every epoch, stop in time."
    task = prepare_task(model, tokenizer, forget, retain, config, embedder)
    objective, thresholds = objective or ICU(config.alpha, config.beta), thresholds or Thresholds()
    scorer = BERTScorer(encoder) if encoder else None
    seed_everything(config.seed)
    accelerator = Accelerator(mixed_precision=mixed_precision())
    model.float().eval().to(accelerator.device)  # fp32: at lr 5e-6 a bf16 weight does not move
    parts = {"forget": task.forget, "neighbor": task.neighbors}
    reference = OriginalModel(model, {name: parts[name] for name in getattr(objective, "remembers", parts)}, config.eval_batch_size)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.lr, betas=(0.9, 0.98))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(config.seed)
    options = dict(n=config.n, start=config.start, batch_size=config.eval_batch_size)

    def enough() -> bool:
        tokens = (task.forget.input_ids, task.forget.attention_mask)
        accuracy = memorization_accuracy(model, *tokens, batch_size=config.eval_batch_size).mean()
        return bool(accuracy <= thresholds.ma and (thresholds.el >= 1 or extraction_likelihood(model, *tokens, **options).mean() <= thresholds.el))

    history, samples, reason, message = [], [], None, ""
    losses, trained = {}, 0.0
    progress = tqdm(total=config.max_epochs, desc="unlearn", unit="epoch")
    try:
        for epoch in range(config.max_epochs + 1):
            if epoch:
                began = time.perf_counter()
                rows = torch.from_numpy(active.nonzero()[0])
                rows = rows[torch.randperm(len(rows), generator=generator)]
                losses = train_epoch(prepared, optimizer, accelerator, objective, reference, task, rows, config, enough)
                trained = time.perf_counter() - began
            began = time.perf_counter()
            scores = check(model, tokenizer, task.forget, scorer=scorer, num_beams=config.num_beams, **options)
            active = np.asarray(refinement(scores, thresholds), dtype=bool) if refinement else np.full(len(scores), True)
            seconds = {"seconds_train": trained, "seconds_check": time.perf_counter() - began}
            history.append({"epoch": epoch, **losses, **scores[METRICS].mean(), "active": int(active.sum()), **seconds})
            samples.append(scores.assign(epoch=epoch, active=active))
            progress.update(epoch > 0)
            progress.set_postfix(ma=f"{history[-1]['ma']:.3f}", el=f"{history[-1]['el']:.3f}", active=history[-1]["active"])
            if reason := stop_reason(scores, active, thresholds, config, epoch):
                break
    except KeyboardInterrupt:
        reason = "interrupted"
    except NonFinite as error:
        reason, message = "non_finite_loss", f"epoch {epoch}: {error}. Try a smaller lr."
        warnings.warn(message, stacklevel=2)
    finally:
        progress.close()
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    frame = pd.DataFrame(history).reindex(columns=[*HISTORY, *sorted({*losses} - {*HISTORY})])
    samples = pd.concat(samples, ignore_index=True)[SAMPLES] if samples else pd.DataFrame(columns=SAMPLES)
    return UnlearnResult(model, frame, samples, config, reason, thresholds, task.pairs, message or MESSAGES[reason])


METRICS = ["ma", "el", "bleu", "bert_f1"]
HISTORY = ["epoch", "loss", "l_fgt", "l_lrn", "l_kl", *METRICS, "active", "seconds_train", "seconds_check"]
SAMPLES = ["epoch", "id", *METRICS, "entropy", "distinct", "active", "continuation"]
