import copy
from collections.abc import Callable
import faiss
import numpy as np
import torch
import torch.nn.functional as F
from icu_nb.core import InputError, require, require_number
from icu_nb.data import Sequences, check_texts, containment, tokenize, word_ngrams
from icu_nb.metrics import evaluating
from icu_nb.models import mean_token_nll


def pair_learning_loss(
    logits: torch.Tensor, # [B, T, V], the model's answer to the neighbors
    input_ids: torch.Tensor, # LongTensor [B, T], the neighbors
    attention_mask: torch.Tensor|None=None, # [B, T]; None: all tokens are real
) -> torch.Tensor: # scalar
    "L_lrn: the mean negative log-likelihood of the neighbors' tokens, in nats; 0 when no position counts."
    return mean_token_nll(logits, input_ids, attention_mask)


def kl_loss(
    logits: torch.Tensor, # [B, T, V], the current model
    ref_logits: torch.Tensor, # [B, T, V], the original model on the same tokens
    attention_mask: torch.Tensor|None=None, # [B, T]; None: all tokens are real
) -> torch.Tensor: # scalar
    "L_kl: the mean over positions of KL(original || current), in nats; 0 when no position counts."
    mask = torch.ones(logits.shape[:2], device=logits.device) if attention_mask is None else attention_mask
    real = mask[:, :-1].bool() & mask[:, 1:].bool()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_q = F.log_softmax(logits[:, :-1][real], -1, dtype=dtype)
    log_p = F.log_softmax(ref_logits[:, :-1][real], -1, dtype=dtype)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / real.sum().clamp(min=1)


def last_hidden_states(
    model, # a causal LM
    batch: Sequences, # B sequences on the model's device
) -> torch.Tensor: # [B, T, H]
    "What enters the output head: the last hidden states, whatever the architecture calls them."
    caught = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    finally:
        hook.remove()
    return caught[0]


def model_embedder(
    model, # a causal LM
    tokenizer, # its tokenizer
    batch_size: int=32, # texts per forward pass
) -> Callable: # texts -> float32 array [n, H]
    "The offline default: the model's own last hidden states, averaged over a text's tokens, at unit length."
    def embed(texts: list[str]) -> np.ndarray:
        sequences = tokenize(texts, tokenizer, getattr(model.config, "max_position_embeddings", None))
        means = []
        with evaluating(model):
            for batch in sequences.batches(batch_size):
                batch = batch.to(model.device)
                weights = batch.attention_mask[..., None]
                means.append((last_hidden_states(model, batch)*weights).sum(1) / weights.sum(1).clamp(min=1))
        return F.normalize(torch.cat(means).float(), dim=-1).cpu().numpy()
    return embed


def sentence_embedder(
    name: str, # a sentence-transformers name or folder; the paper uses all-MiniLM-L6-v2
) -> Callable: # texts -> float32 array [n, D]
    "An embedder from sentence-transformers."
    try:
        from sentence_transformers import SentenceTransformer
        encoder = SentenceTransformer(str(name))
    except ImportError as error:
        raise InputError("`embedder`: sentence-transformers is not installed. Run `pip install icu_nb[paper]`, or leave `embedder` out: then the model's own hidden states are used.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"`embedder`: {str(name)!r} cannot be loaded. Check the name, or the network, or name a local folder. ({str(error).splitlines()[0]})") from error
    return lambda texts: encoder.encode(texts, show_progress_bar=False)


def second_half(
    embedder: Callable, # texts -> float array [n, D]
    tokenizer, # cuts the texts into tokens
) -> Callable: # texts -> float array [n, D]
    "An embedder that sees the second half of every text only, as in the paper (tokens 100 to 200 of 200)."
    halves = lambda texts: [tokenizer.decode(tokens[len(tokens)//2:]) for tokens in tokenizer(list(texts))["input_ids"]]
    return lambda texts: embedder(halves(texts))


def embed_checked(
    embedder: Callable, # texts -> float array [n, D]
    texts: list[str], # n texts
) -> np.ndarray: # float32 array [n, D]
    "The embedder's vectors, or one clear error when they are not one finite vector per text."
    vectors = np.ascontiguousarray(embedder(texts), dtype=np.float32)
    require(vectors.ndim == 2 and len(vectors) == len(texts), "embedder", f"it gave an array of shape {vectors.shape} for {len(texts)} texts", "It must give one vector per text")
    require(np.isfinite(vectors).all(), "embedder", "it gave NaN or infinite numbers", "Check the texts, and the model behind it")
    return vectors


def nearest_neighbors(
    forget: list[str], # n texts to unlearn
    retain: list[str], # the pool of texts that may stay
    *,
    embedder: Callable, # texts -> float array [n, D]
    k: int=1, # neighbors per text
    max_overlap: float=0.5, # a candidate that holds a larger share of the text's 10-grams is passed over
) -> np.ndarray: # IntArray [n, k]: indices into `retain`, nearest first
    "The nearest texts of the retain pool by exact L2 search (faiss), near-duplicates passed over."
    forget, retain = check_texts(forget, "forget"), check_texts(retain, "retain")
    require(isinstance(k, int) and k >= 1, "k", f"{k!r} is not a positive integer", "The paper uses k=1")
    require(len(retain) >= k, "retain", f"{len(retain)} texts are fewer than k={k}", "Give more texts or a smaller k")
    require_number("max_overlap", max_overlap, high=1.0)
    vectors, queries = embed_checked(embedder, retain), embed_checked(embedder, forget)
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    grams = [word_ngrams(text) for text in forget]
    far_enough = lambda i, j: containment(grams[i], word_ngrams(retain[j])) <= max_overlap
    chosen, depth = {}, 4*k
    while len(chosen) < len(forget):
        depth = min(depth, len(retain))
        waiting = [i for i in range(len(forget)) if i not in chosen]
        for i, candidates in zip(waiting, index.search(queries[waiting], depth)[1]):
            found = [j for j in candidates.tolist() if far_enough(i, j)][:k]
            if len(found) == k:
                chosen[i] = found
        lacking = [i for i in waiting if i not in chosen]
        require(depth < len(retain) or not lacking, "retain", f"for forget texts {lacking[:5]} fewer than {k} texts are left once near-duplicates are passed over", "Add other texts to the pool, or raise max_overlap")
        depth *= 4
    return np.array([chosen[i] for i in range(len(forget))])


def head_suffices(
    model, # a causal LM
    head, # a copy of its output head
    batch: Sequences, # B sequences on the model's device
) -> bool:
    "Whether the head alone makes the logits; Gemma 2 caps them afterwards, Cohere scales them."
    logits, again = model(**vars(batch)).logits, head(last_hidden_states(model, batch))
    return bool((again - logits).abs().max() <= 1e-6*logits.abs().max())


class OriginalModel:
    "What the original model says about fixed sequences, at the price of its last hidden states and one copy of its output head."
    def __init__(self,
        model, # the original model, before any training
        parts: dict[str, Sequences], # the sequences it will be asked about, by name
        batch_size: int=32, # sequences per forward pass
    ):
        # The head is copied because, tied to the embedding, it trains too.
        self.head = copy.deepcopy(model.get_output_embeddings()).requires_grad_(False)
        self.sequences = {name: sequences.to(model.device) for name, sequences in parts.items()}
        probe = next((sequences[:batch_size] for sequences in self.sequences.values() if len(sequences)), None)
        with evaluating(model):
            self.parts = {name: self._hidden(model, sequences, batch_size) for name, sequences in self.sequences.items()}
            suffices = probe is None or head_suffices(model, self.head, probe)
        self.whole = None if suffices else copy.deepcopy(model).eval().requires_grad_(False)

    def _hidden(self, model, sequences: Sequences, batch_size: int) -> torch.Tensor:
        states = [last_hidden_states(model, batch) for batch in sequences.batches(batch_size)]
        return torch.cat(states) if states else torch.empty(0)

    def hidden(self,
        part: str, # "forget" or "neighbor"
        rows: torch.Tensor, # LongTensor [B]: which of its sequences
    ) -> torch.Tensor: # [B, T, H]
        "The original model's last hidden states."
        return self.parts[part][rows]

    @torch.no_grad()
    def logits(self,
        part: str, # "forget" or "neighbor"
        rows: torch.Tensor, # LongTensor [B]: which of its sequences
    ) -> torch.Tensor: # [B, T, V]
        "The original model's logits, exactly: its head applied to its hidden states, or a whole copy asked where that is not enough."
        return self.head(self.hidden(part, rows)) if self.whole is None else self.whole(**vars(self.sequences[part][rows])).logits
