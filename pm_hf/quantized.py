"""4-bit bases of bitsandbytes: what keeps them differentiable."""

from torch import nn

from pm_hf.errors import InputError

PACKS = "support_avx512bf16_for_cpu"  # attribute of its 4-bit layers, true where they would lay their weights out anew


def keep_differentiable(model: nn.Module) -> None:
    """Switch off the layout that 4-bit weights take on some CPUs in a forward pass in eval mode without gradients.

    No gradient passes the weights in it, in training either, and bitsandbytes 0.50 neither goes back nor fails: after
    one evaluation everything below such a layer would stop learning. InputError where it was taken already: it rounds
    the scales of the weights, so there is no way back.
    """
    for name, layer in model.named_modules():
        if getattr(layer, PACKS, False):
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                raise InputError(
                    f"the 4-bit weights of {name} were laid out for inference by a forward pass without gradients, and "
                    "no gradient passes them any more; load the base again and evaluate it after this"
                )
            setattr(layer, PACKS, False)
