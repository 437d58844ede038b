"""Batch norm in training mode over several processes, which share out a batch."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tdcompile.training.distributed import devices
from tdcompile.training.sync_batchnorm import synchronized_batchnorm


class Own(nn.BatchNorm2d):
    """A class with a ``forward`` of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def norms() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Each kind of batch norm, and the shape of a sample."""
    torch.manual_seed(1)
    made: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.BatchNorm1d(3), (3,)),
        (nn.BatchNorm1d(3, momentum=None), (3, 5)),
        (nn.BatchNorm2d(3, momentum=0.3), (3, 4, 2)),
        (nn.BatchNorm2d(3, affine=False), (3, 4, 2)),
        (nn.BatchNorm2d(3, track_running_stats=False), (3, 4, 2)),
        (nn.BatchNorm3d(3, eps=1e-2), (3, 2, 2, 3)),
    ]
    for module, _ in made:
        for parameter in module.double().parameters():
            nn.init.normal_(parameter)
    return made


def passed(module: nn.Module, x: Tensor, places: slice) -> dict[str, Tensor]:
    """Two steps in training mode on a part of a batch, and one in eval mode: answers, gradients, statistics."""
    x, shape = x[places].clone().requires_grad_(), x.shape[1:]
    for _ in range(2):
        made = module(x)
    (made * torch.arange(1.0, 8.0)[places].view(-1, *(1 for _ in shape))).sin().sum().backward()
    found = {"made": made.detach(), "gradient": x.grad, **{f"state/{k}": v for k, v in module.state_dict().items()}}
    found |= {f"slope/{name}": p.grad for name, p in module.named_parameters()}
    return found | {"eval": module.eval()(x).detach()}


def _normalises(rank: int, port: int, out: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    devices(cpu=True)
    own, found = Own(3), []
    for module, shape in norms():
        kind, names = type(module), set(vars(module))
        torch.manual_seed(2)
        x = 1e4 + torch.randn(7, *shape, dtype=torch.float64)
        with synchronized_batchnorm(nn.ModuleList([module, own])):
            assert "forward" not in vars(own)
            found.append(passed(module, x, slice(0, 2) if rank == 0 else slice(2, 7)))
        assert (type(module), set(vars(module))) == (kind, names)
    torch.save(found, f"{out}/{rank}.pt")


def test_over_processes_with_shares_of_any_size_batch_norm_is_that_of_the_whole_batch(
    tmp_path: Path, free_port: int
) -> None:
    torch.multiprocessing.spawn(_normalises, (free_port, str(tmp_path)), nprocs=2)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for (module, shape), one, other in zip(norms(), *shares, strict=True):
        torch.manual_seed(2)
        whole = passed(module, 1e4 + torch.randn(7, *shape, dtype=torch.float64), slice(0, 7))
        assert whole.keys() == one.keys() == other.keys()
        for name, value in whole.items():
            if name.startswith("state/"):
                torch.testing.assert_close(one[name], value, atol=1e-9, rtol=1e-9)
                torch.testing.assert_close(other[name], one[name], atol=0.0, rtol=0.0)
                continue
            pair = (one[name], other[name])
            of_both = sum(pair) if name.startswith("slope/") else torch.cat(pair)
            if name != "eval" or module.running_mean is not None:  # else each share has statistics of its own
                torch.testing.assert_close(of_both, value, atol=1e-9, rtol=1e-9)


def test_in_one_process_batch_norm_is_left_alone() -> None:
    module = nn.BatchNorm2d(3)
    with synchronized_batchnorm(nn.Sequential(module)):
        assert "forward" not in vars(module)
