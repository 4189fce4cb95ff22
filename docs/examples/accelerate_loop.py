"""Fine-tune a converted model with Accelerate: any device, mixed precision, several processes.

accelerate launch accelerate_loop.py converted/ resnet18 original.safetensors photos/ tuned/
torchrun --nproc-per-node 2 accelerate_loop.py converted/ resnet18 original.safetensors photos/ tuned/
"""

import sys

import timm
import torch
from accelerate import Accelerator
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ghostify import load, save

converted, name, weights, photos, tuned = sys.argv[1:]
epochs, batch, temperature = 2, 16, 2.0

accelerator = Accelerator(cpu=not torch.accelerator.is_available())
teacher = timm.create_model(name, checkpoint_path=weights).eval()
augment = create_transform(**resolve_data_config({}, model=teacher), is_training=True)
teacher = teacher.to(accelerator.device)
student = load(converted)
optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, nesterov=True)
loader = DataLoader(ImageDataset(photos, transform=augment), batch // accelerator.num_processes, shuffle=True)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)

student.train()
for epoch in range(epochs):
    for x, _ in loader:
        with torch.no_grad():
            teacher_probabilities = F.softmax(teacher(x) / temperature, 1)
        with accelerator.autocast():
            student_log_probabilities = F.log_softmax(student(x).float() / temperature, 1)
        loss = temperature**2 * F.kl_div(student_log_probabilities, teacher_probabilities, reduction="batchmean")
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

if accelerator.is_main_process:
    save(accelerator.unwrap_model(student).cpu().eval(), tuned)
accelerator.end_training()
