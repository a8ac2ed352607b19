"""One loop for learners of the whole model, and what it shares with finetuning."""
