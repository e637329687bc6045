"""The plugin that sends the operators' tests to the GPU, without one."""

from __future__ import annotations

import torch

from .plugin import elsewhere


def test_arguments_go_to_the_device_and_results_come_back() -> None:
    seen = []

    def operator(*args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        seen.append([x.device.type if isinstance(x, torch.Tensor) else x for x in (*args, *kwargs.values())])
        return torch.zeros(2), torch.ones(3)

    results = elsewhere(operator, "meta")(torch.zeros(3), None, 2.0, mask=torch.zeros(1))
    assert seen == [["meta", None, 2.0, "meta"]]
    assert [x.device.type for x in results] == ["cpu", "cpu"] and torch.equal(results[1], torch.ones(3))
