"""Fine-tuning towards the original."""
