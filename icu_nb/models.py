import hashlib, json, math
from collections.abc import Callable
from pathlib import Path

from icu_nb.core import InputError, atomic_path, best_device, cache_dir, library_versions, require, seed_everything, write_json
from icu_nb.data import Corpus, Sequences, pad, tokenize
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_model as load_weights, save_model as save_weights
from tokenizers import ByteLevelBPETokenizer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup


def train_tokenizer(
    texts: list[str], # what it learns its merges from
    vocab_size: int=2048, # tokens, the special ones included
) -> PreTrainedTokenizerFast:
    "A byte-level BPE tokenizer, trained on the spot."
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|pad|>")


def tiny_gpt_neo(
    vocab_size: int=2048, # the tokenizer's
    max_length: int=128, # the longest sequence it can take, in tokens
    n_layers: int=4, # alternating global and local attention
    hidden_size: int=128, # width
    n_heads: int=4, # attention heads per layer
    seed: int=0, # of the random weights
) -> GPTNeoForCausalLM:
    "A GPT-Neo with about one million random parameters: the paper's architecture at a hundredth of its smallest size."
    require(n_layers % 2 == 0 and n_layers > 0, "n_layers", f"{n_layers} is not an even number", "Layers come in pairs, global and local")
    seed_everything(seed)
    config = GPTNeoConfig(
        vocab_size=vocab_size, max_position_embeddings=max_length, hidden_size=hidden_size, num_layers=n_layers, num_heads=n_heads,
        attention_types=[[["global", "local"], n_layers//2]], window_size=64, bos_token_id=0, eos_token_id=0,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0)
    return GPTNeoForCausalLM(config).eval()


class LiveCurve:
    "A callback for `memorize` that draws the loss while it falls."
    def __init__(self,
        title: str="Training loss", # what the picture says
    ):
        self.title, self.epochs, self.losses, self.handle = title, [], [], None

    def __call__(self, model, epoch: int, loss: float) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import display
        self.epochs.append(epoch)
        self.losses.append(loss)
        fig, ax = plt.subplots(figsize=(6, 2.6))
        ax.plot(self.epochs, self.losses, marker="o", markersize=3)
        ax.set(title=self.title, xlabel="epoch", ylabel="mean loss (nats per token)", ylim=(0, None))
        plt.close(fig)
        if self.handle is None:
            self.handle = display(fig, display_id=True)
        else:
            self.handle.update(fig)


def token_losses(
    logits: torch.Tensor, # [B, T, V]
    input_ids: torch.Tensor, # LongTensor [B, T]
    attention_mask: torch.Tensor|None=None, # [B, T]; None: all tokens are real
) -> tuple[torch.Tensor, torch.Tensor]: # both [B, T-1]: negative log-likelihoods in nats (0 where not real), and whether the position counts
    "The negative log-likelihood of every next token; a position counts when its token and the next are both real."
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    real = mask[:, :-1].bool() & mask[:, 1:].bool()
    logits = logits[:, :-1].float() if logits.dtype in (torch.float16, torch.bfloat16) else logits[:, :-1]
    labels = input_ids[:, 1:].where(real, -100)
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return nll.view_as(labels), real


def mean_token_nll(
    logits: torch.Tensor, # [B, T, V]
    input_ids: torch.Tensor, # LongTensor [B, T]
    attention_mask: torch.Tensor|None=None, # [B, T]; None: all tokens are real
) -> torch.Tensor: # scalar, in nats; 0 when no position counts
    "CE: the mean negative log-likelihood over all positions of the batch that count."
    nll, real = token_losses(logits, input_ids, attention_mask)
    return nll.sum() / real.sum().clamp(min=1)


def recipe_key(
    model, # its configuration and weights are part of the recipe
    **recipe, # everything else that the result depends on
) -> str:
    "A hash of all that a trained model depends on: recipe, texts, initial weights and library versions."
    digest = hashlib.sha256(json.dumps([recipe, model.config.to_dict(), library_versions()], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def random_starts(
    tokens: list[list[int]], # the texts of one epoch
    generator: torch.Generator, # seeded
) -> list[list[int]]: # the same texts, half of them without a random beginning
    "Every other text starts somewhere in its first half: pretraining cuts texts into blocks anywhere, so a model meets their middle without their beginning."
    return [row[int(r*len(row)) if r < 0.5 else 0:] for row, r in zip(tokens, torch.rand(len(tokens), generator=generator).tolist())]


def memorize(
    model, # a causal LM; trained in place
    tokenizer, # its tokenizer
    texts: list[str], # the texts to memorize; may be empty (retraining without them)
    background: list[str], # texts seen once an epoch
    *,
    repeats: int=14, # how often each of `texts` is seen an epoch: what is repeated is memorized
    epochs: int=5, # passes
    lr: float=2e-3, # peak learning rate of AdamW, warmed up and cosine-decayed
    batch_size: int=8, # texts per step
    seq_len: int=96, # longer texts are cut
    seed: int=0, # of the order of the texts
    callback: Callable|None=None, # called after each epoch as callback(model, epoch, loss)
    cache: bool=True, # keep the result on disk, and take it from there
) -> pd.DataFrame: # one row per epoch: epoch, loss (mean nats per token)
    "Train until the repeated texts are memorized; knows no metric but its loss."
    tokens = tokenize([*texts, *background], tokenizer, seq_len).tokens()
    rows = [*list(range(len(texts)))*repeats, *range(len(texts), len(tokens))]
    require(len(rows) > 0, "texts", "there is nothing to train on", "Give texts or background")
    longest, context = max(map(len, tokens)), getattr(model.config, "max_position_embeddings", seq_len)
    require(longest <= context, "seq_len", f"a text has {longest} tokens and the model takes {context}", "Choose a smaller seq_len")
    recipe = dict(tokens=tokens, rows=rows, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
    folder = cache_dir()/"models"/recipe_key(model, **recipe)
    if cache and (folder/"history.json").exists():
        load_weights(model, folder/"model.safetensors")
        model.to(best_device())
        return pd.DataFrame(json.loads((folder/"history.json").read_text()))
    generator, history = torch.Generator().manual_seed(seed), []
    step = trainer(model.to(best_device()), lr, epochs * math.ceil(len(rows)/batch_size))
    for epoch in (progress := tqdm(range(1, epochs + 1), desc="memorize", unit="epoch")):
        order = torch.randperm(len(rows), generator=generator).tolist()
        epoch_tokens = random_starts([tokens[rows[i]] for i in order], generator)
        losses = [step(pad(epoch_tokens[k:k + batch_size])) for k in range(0, len(rows), batch_size)]
        history.append({"epoch": epoch, "loss": sum(losses)/len(losses)})
        progress.set_postfix(loss=f"{history[-1]['loss']:.3f}")
        if callback is not None:
            callback(model, epoch, history[-1]["loss"])
    history = pd.DataFrame(history)
    if cache:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            save_weights(model, str(temporary/"model.safetensors"))
            write_json(temporary/"history.json", history.to_dict("list"))
    return history


def trainer(
    model, # a causal LM; trained in place
    lr: float, # peak learning rate
    steps: int, # how many steps there will be
) -> Callable: # Sequences -> their loss before the step
    "Plain next-token training: AdamW, warmed up over a twentieth of the steps, then a cosine."
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps//20, steps)
    def step(batch: Sequences) -> float:
        batch = batch.to(model.device)
        loss = mean_token_nll(model(**vars(batch)).logits, **vars(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()
    return step


def tiny_model(
    corpus: Corpus, # the texts
    seed: int=0, # of the weights and of the order of the texts
    *,
    retrained: bool=False, # leave the forget set out: the model that unlearning is measured against
    seq_len: int=96, # longer texts are cut
    callback: Callable|None=None, # see `memorize`
) -> tuple: # model, tokenizer, history
    "The tiny model of all notebooks: its tokenizer, its weights and its memory of the corpus, trained once and then taken from the cache."
    tokenizer = train_tokenizer(corpus.trained_on())
    model = tiny_gpt_neo(len(tokenizer), seed=seed)
    history = memorize(model, tokenizer, [] if retrained else corpus.forget, corpus.retain + corpus.general_train,
                       epochs=corpus.epochs, repeats=corpus.repeats, seq_len=seq_len, seed=seed, callback=callback)
    return model, tokenizer, history


def load_model(
    name: str|Path, # a Hub name or a local folder
    *,
    device: str|torch.device|None=None, # None: the best there is
    revision: str|None=None, # a branch, tag or commit of the Hub repository
) -> tuple: # model (fp32 weights, evaluation mode), tokenizer
    "Any Hugging Face causal LM with its tokenizer; weights from safetensors only, no remote code."
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        known = "is an existing folder" if Path(name).is_dir() else "is no local folder"
        raise InputError(f"`model`: {str(name)!r} cannot be loaded; it {known}. Check the name, or the network where it stands on the Hub, or name a folder made by save_pretrained. ({next(iter(str(error).splitlines()), type(error).__name__)})") from error
    require(len(tokenizer) <= model.config.vocab_size, "model", f"its tokenizer has {len(tokenizer)} tokens and the model knows {model.config.vocab_size}", "Use the tokenizer that belongs to the model")
    return model.to(device or best_device()).eval(), tokenizer
