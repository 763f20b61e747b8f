"""Turn the linear layers of a model into masked ones."""

from collections.abc import Callable

from torch import nn

from .masked_nn import MaskedLinear


def swap_linears(
    module: nn.Module, where: Callable[[str], bool] = lambda name: True, **options
) -> None:
    """Replace every `nn.Linear` of `module` whose dotted name passes `where` by a `MaskedLinear`.

    The new layers share weights and biases with the old ones. options: of `MaskedLinear`.
    """
    for name, old in list(module.named_modules()):
        if type(old) is nn.Linear and where(name):
            options |= {"device": old.weight.device, "dtype": old.weight.dtype}
            new = MaskedLinear(old.in_features, old.out_features, old.bias is not None, **options)
            new.weight, new.bias = old.weight, old.bias
            if new.mask_init == "magnitude":
                new.reset_scores()
            module.set_submodule(name, new.train(old.training))
