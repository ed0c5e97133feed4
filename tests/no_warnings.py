"""A whole run by every path: test_versions.py starts it with every deprecation an error."""

import sys
import tempfile

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from icu_nb.config import ICUConfig
from icu_nb.data.people import people
from icu_nb.iur import Thresholds, select_icu, select_published_rule
from icu_nb.language_model import mean_token_nll
from icu_nb.models.loading import load_model, merge_lora
from icu_nb.models.tiny import train_tokenizer
from icu_nb.sampled_pool import sample_pool
from icu_nb.text import tokenize
from icu_nb.unlearn import unlearn


def run(model, tokenizer, records, refinement, folder, **settings):
    config = ICUConfig(
        learning_rate=1e-3, batch_size=4, max_epochs=2, max_length=48, check="full", **settings
    )
    result = unlearn(
        model,
        tokenizer,
        records[:4],
        records[4:],
        config,
        thresholds=Thresholds(ma=0, el=0),
        refinement=refinement,
        checkpoint_dir=f"{folder}/checkpoints",
    )
    result.save_pretrained(f"{folder}/unlearned")
    assert len(result.history) == 3


def learn(model, batch):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        mean_token_nll(model(**batch.inputs).logits, **batch.inputs).backward()
        optimizer.step()


def main():
    records = people(12, seed=3)
    tokenizer = train_tokenizer(records, 300)
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "max_position_embeddings": 64}
    llama = LlamaConfig(**size, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    neo = GPTNeoConfig(**size, num_layers=1, num_heads=2, attention_types=[[["global"], 1]])
    torch.manual_seed(0)
    for model in (LlamaForCausalLM(llama), GPTNeoForCausalLM(neo)):
        learn(model, tokenize(records[:4], tokenizer, 48))
        for refinement, lora in ((select_icu, None), (select_published_rule, None), (select_icu, 4)):
            if lora and "lora" not in sys.argv:
                continue
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                again, tokenizer_again = load_model(folder, device="cpu", lora=lora)
                run(again, tokenizer_again, records, refinement, folder)
                merge_lora(again)
    assert len(sample_pool(model, tokenizer, 2, records, max_length=12, batch_size=4)) == 2


if __name__ == "__main__":
    main()
