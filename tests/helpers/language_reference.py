"""Slow, obvious scores of a language model: one example at a time, no padding, no cache."""

import torch


def ones(*ids):
    return torch.tensor([list(ids)])


@torch.no_grad()
def log_probabilities(model, prompt, answer):
    """Log-probability of each token of the answer, and whether it is the likeliest."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        logits = model(input_ids=ones(*prompt), decoder_input_ids=ones(*start, *answer[:-1])).logits[0]
    else:
        logits = model(input_ids=ones(*prompt, *answer), use_cache=False).logits[0, len(prompt) - 1 : -1]
    found = logits.log_softmax(-1)
    return found[torch.arange(len(answer)), answer], logits.argmax(-1) == torch.tensor(answer)


def mean_log_probability(model, encoder, prompt, answer):
    """Of an answer's tokens after a prompt."""
    return float(log_probabilities(model, encoder.prompt(prompt), encoder.completion(prompt, answer))[0].mean())


@torch.no_grad()
def greedy(model, prompt, end, longest):
    """Token by token, each from a forward pass over everything before it."""
    said = []
    for _ in range(longest):
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            logits = model(input_ids=ones(*prompt), decoder_input_ids=ones(start, *said)).logits
        else:
            logits = model(input_ids=ones(*prompt, *said), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        said.append(token)
    return said
