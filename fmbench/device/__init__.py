"""What is done on an accelerator that is at hand for minutes."""
