import pytest
import torch
from torch import distributed

from ghostify import ghostify, report
from ghostify.fitting.distributed import all_reduce_sum, rank_and_world_size
from tests import nets
from tests.command import FORKS, free_port


def test_without_a_process_group_there_is_one_process():
    tensor = torch.ones(2)
    assert rank_and_world_size() == (0, 1)
    assert all_reduce_sum(tensor)[0] is tensor


def converted(budget):
    torch.manual_seed(0)
    model, x = nets.settle(nets.Residual()), nets.images(32, 12, seed=3)
    options = {"cheap": "auto", "budget": {"macs": 0.6}, "example_inputs": x[:1]} if budget else {}
    return ghostify(model, calibration=x.split(8), **options)


def run_process(rank, processes, port, queue):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    for budget in (False, True):
        model = converted(budget)
        queue.put((budget, {k: v.numpy() for k, v in model.state_dict().items()}, report(model)))
    distributed.destroy_process_group()


def test_two_processes_give_the_result_of_one():
    port, queue = free_port(), FORKS.SimpleQueue()
    processes = [FORKS.Process(target=run_process, args=(k, 2, port, queue)) for k in range(2)]
    for process in processes:
        process.start()
    results = [queue.get() for _ in range(4)]
    for process in processes:
        process.join()
    expected = {budget: converted(budget) for budget in (False, True)}
    assert sorted(budget for budget, *_ in results) == [False, False, True, True]
    for budget, state, summary in results:
        assert summary.images == 32
        for key in ("forecast", "measured"):
            one, several = (getattr(r, key) for r in (report(expected[budget]), summary))
            assert several.images == one.images
            assert several.error == pytest.approx(one.error, rel=1e-2)
        for name, value in expected[budget].state_dict().items():
            torch.testing.assert_close(torch.from_numpy(state[name]), value, rtol=1e-3, atol=1e-4, msg=name)
