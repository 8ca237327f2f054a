"""SANM in a PyTorch training loop: two calls per step, and one fit of label quality per epoch."""

import timm
import torch
from torch.nn import functional as F

from sanm_lightning import SANM, Digits, Noise


def main(epochs: int = 3, samples: int = 300) -> float:
    torch.manual_seed(0)
    train, test = Digits().load_train(), Digits().load_test()
    images, labels = train.images[:samples].float() / 255, train.labels[:samples]
    labels = Noise("symmetric", 0.4).apply(labels, num_classes=10, seed=0)

    network = timm.create_model("preact_resnet18", num_classes=10, width=6)
    sanm = SANM()
    sanm.build(network, image_size=(32, 32))  # before the optimizer: the decoder has parameters
    sanm.label_quality.reset(len(images))
    optimizer = torch.optim.SGD([*network.parameters(), *sanm.parameters()], lr=0.05, momentum=0.9)

    for epoch in range(epochs):
        if epoch > 0:
            sanm.label_quality.fit()
        for index in torch.randperm(len(images)).split(25):
            x, targets = images[index], F.one_hot(labels[index], 10).float()
            quality = sanm.source_of_quality(targets, index) if epoch >= 1 else None  # None: warm-up, no masks
            views = sanm(network, x, targets, quality)
            features = network.forward_features(views.images)
            logits = network.forward_head(features)
            sanm.label_quality.update(views.unmasked(logits), targets, index)
            loss = F.cross_entropy(logits, views.targets) + sanm.reconstruction(features, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    network.eval()
    with torch.no_grad():
        accuracy = (network(test.images.float() / 255).argmax(1) == test.labels).float().mean().item()
    print(f"plain loop, 40 % of the labels redrawn: {accuracy:.1%} right on the test digits after {epochs} epochs")
    return accuracy


if __name__ == "__main__":
    main()
