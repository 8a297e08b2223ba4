"""Fine-tuning an encoder on labels: classes, scores or transcripts."""
