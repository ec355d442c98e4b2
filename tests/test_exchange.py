"""Gradients averaged over real processes, against a plain all-reduce of all of them."""

import pytest
import torch
from training_workers import FORKS

from llkd_ray.student.exchange import GradientMean


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(50, 8, padding_idx=0)
        self.places = torch.nn.Embedding(6, 8)
        self.head = torch.nn.Linear(8, 3)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, ids):
        return self.head((self.words(ids) + self.places.weight[: ids.shape[1]]).mean(dim=1))


def compare(rank, world_size, meeting):
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world_size
    )
    model = Classifier()
    average = GradientMean(model)
    for step in range(3):  # The buffer is used again.
        # One row is touched by all, some by one worker, most by none; of the last step, no text.
        ids = torch.tensor([[7, 10 + rank, 20 + step], [7, 30 + rank, 0]])
        ids = ids if step < 2 or rank else torch.zeros_like(ids)
        model.zero_grad()
        (model(ids).square().sum() * (1 + rank)).backward()
        expected = []
        for parameter in model.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            expected.append(gradient.clone())
            torch.distributed.all_reduce(expected[-1])
        average()
        for parameter, summed in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, summed / world_size)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_mean_without_zeros_is_the_mean_of_all_to_the_last_bit(tmp_path, world_size):
    meeting = (tmp_path / "meeting").as_uri()
    workers = [
        FORKS.Process(target=compare, args=(rank, world_size, meeting))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
