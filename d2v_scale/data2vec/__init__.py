"""The method: masks, targets, loss, EMA, signs of collapse. Pure: no input or output, no ranks."""
