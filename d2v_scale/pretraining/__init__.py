"""Pretraining: a student that predicts its teacher's targets."""
