import torch
from icu_nb.models import mean_token_nll


def unlearning_loss(
    logits: torch.Tensor, # [B, T, V], the model's answer to the forget sequences
    input_ids: torch.Tensor, # LongTensor [B, T], the forget sequences
    attention_mask: torch.Tensor|None=None, # [B, T]; None: all tokens are real
) -> torch.Tensor: # scalar
    "KUI: minus the mean negative log-likelihood of the forget tokens, in nats; 0 when no position counts."
    return -mean_token_nll(logits, input_ids, attention_mask)
