"""What representations are worth: k-NN and linear probes on frozen features."""
