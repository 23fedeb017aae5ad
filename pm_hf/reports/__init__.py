"""What others see of a finished run: page, charts, card, Hub."""
