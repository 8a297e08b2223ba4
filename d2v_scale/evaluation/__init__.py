"""What representations are worth: k-NN and linear probes on frozen features."""

from d2v_scale.evaluation.features import Features, extract
from d2v_scale.evaluation.knn import knn, nearest, whitened
from d2v_scale.evaluation.probes import ProbeResult, linear_probe, score, weighted_layers_probe

__all__ = [
    "Features",
    "ProbeResult",
    "extract",
    "knn",
    "linear_probe",
    "nearest",
    "score",
    "weighted_layers_probe",
    "whitened",
]
