import torch

from ghostify.cli.demo_network import ResidualNet, train
from ghostify.data import datasets
from ghostify.evaluation.metrics import predict, top1


def test_training_is_deterministic_and_learns():
    data = datasets.digits()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ResidualNet(8, 8)
        train(model, data.train, data.train_labels, epochs=6, flip=False)
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert top1(predict(models[0], [data.test]), data.test_labels) > 80
