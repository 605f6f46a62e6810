"""Random transformers models to compare targets with."""

import torch

# Two beside another busy job on two cores fall to a tenth of the speed of one.
torch.set_num_threads(1)


def random_torch(model_class, config) -> torch.nn.Module:
    """Sets norms near one and spreads all other weights so that logits differ clearly."""
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        weight.data = float("norm" in name) + 0.3 * torch.randn(weight.shape, generator=generator)
    return model
