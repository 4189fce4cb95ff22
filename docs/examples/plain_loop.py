"""Fine-tune a converted model in a plain PyTorch loop: towards the original's outputs, without labels.

    python plain_loop.py converted/ resnet18 original.safetensors photos/ tuned/

Copy it and change it. `ghostify finetune` does the same, and resumes after an interruption.
"""

import sys

import timm
import torch
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ghostify import load, save

converted, name, weights, photos, tuned = sys.argv[1:]
epochs, batch, temperature = 2, 16, 2.0

student = load(converted)
teacher = timm.create_model(name, checkpoint_path=weights).eval()
augment = create_transform(**resolve_data_config({}, model=teacher), is_training=True)
loader = DataLoader(ImageDataset(photos, transform=augment), batch, shuffle=True)

optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, nesterov=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
student.train()
for epoch in range(epochs):
    for x, _ in loader:
        with torch.no_grad():
            teacher_probabilities = F.softmax(teacher(x) / temperature, 1)
        student_log_probabilities = F.log_softmax(student(x) / temperature, 1)
        loss = temperature**2 * F.kl_div(student_log_probabilities, teacher_probabilities, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

save(student.eval(), tuned)
