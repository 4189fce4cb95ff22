import torch
from torch import nn

from ghostify.timing.interleaved import interleaved_latency_ms, time_interleaved


def test_a_model_that_does_more_takes_longer():
    small, big = nn.Conv2d(8, 8, 3), nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(12)])
    few, many = interleaved_latency_ms([small, big], [torch.zeros(4, 8, 64, 64)] * 2, rounds=5)
    assert 0 < few < many


def test_each_forward_has_one_latency_a_round_and_turns_alternate():
    calls = []
    latencies = time_interleaved([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert [len(of_one) for of_one in latencies] == [3, 3]
    assert calls[:2] == ["a", "b"]
    assert min(min(of_one) for of_one in latencies) > 0
