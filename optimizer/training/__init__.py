"""Training: one loop for fine-tuning, distillation, and whatever loss it is given."""
