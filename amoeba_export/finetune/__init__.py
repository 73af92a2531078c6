"""Stage 2, one-for-all fine-tuning: one run trains adapters for every shape at once (paper sec. 3.3)."""
