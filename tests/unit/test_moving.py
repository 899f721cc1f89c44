"""What moves gradients on a GPU does as torch does. On a CPU it is torch: tests/unit/test_master.py."""

import torch

from pentode.optim.moving import move


def test_a_gpu_adds_gradients_of_every_kind_as_torch_does(kernels: torch.device) -> None:
    generator = torch.Generator(kernels).manual_seed(0)
    side = 1100  # squared more than LARGE, from which a kernel adds
    sizes = [(3,), (side, side), (side, side), (side * side + 5,), (side, side)]
    gradients = [torch.randn(size, generator=generator, device=kernels).bfloat16() for size in sizes]
    gradients[2], gradients[4] = gradients[2].T, gradients[4].float()
    places = [torch.randn(size, generator=generator, device=kernels) for size in sizes]
    sums = [place + gradient for place, gradient in zip(places, gradients, strict=True)]
    move(places, gradients, add=True)
    assert all(torch.equal(place, total) for place, total in zip(places, sums, strict=True))
