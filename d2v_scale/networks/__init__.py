"""What stands above the stems: stacks and predictors."""
