"""Published peak numbers of devices, and how much of them is assumed to be reached."""

from dataclasses import dataclass

from d2v_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device and what it is connected by. Bytes and FLOPs are decimal; bandwidths are per direction."""

    name: str
    bf16_flops: float
    """Peak of dense bf16 matrix products, FLOP/s."""
    memory_bytes: float
    """Device memory."""
    memory_bandwidth: float
    """Device memory, bytes/s."""
    link_bandwidth: float
    """NVLink between the devices of a node, bytes/s of one device in one direction."""
    network_bandwidth: float
    """Network between nodes, bytes/s of one device in one direction (one adapter per device)."""
    host_bandwidth: float
    """PCIe between a device and host memory, bytes/s in one direction."""
    host_bytes: float
    """Host memory per device."""
    host_memory_bandwidth: float
    """Host memory, bytes/s per device."""


H100 = Hardware(  # SXM5 80 GB; NVLink 4; one 400 Gb/s adapter per device; PCIe 5 x16; 2 TB per node of 8 (DGX H100),
    # whose two processors have eight channels of DDR5-4800 each
    name="h100",
    bf16_flops=989.4e12,
    memory_bytes=80e9,
    memory_bandwidth=3.35e12,
    link_bandwidth=450e9,
    network_bandwidth=50e9,
    host_bandwidth=64e9,
    host_bytes=250e9,
    host_memory_bandwidth=76.8e9,
)
H200 = Hardware(  # SXM 141 GB; otherwise as H100 (DGX H200)
    name="h200",
    bf16_flops=989.4e12,
    memory_bytes=141e9,
    memory_bandwidth=4.8e12,
    link_bandwidth=450e9,
    network_bandwidth=50e9,
    host_bandwidth=64e9,
    host_bytes=250e9,
    host_memory_bandwidth=76.8e9,
)
A100 = Hardware(  # SXM4 80 GB; NVLink 3; one 200 Gb/s adapter per device; PCIe 4 x16; 2 TB per node of 8 (DGX A100),
    # whose two processors have eight channels of DDR4-3200 each
    name="a100",
    bf16_flops=312e12,
    memory_bytes=80e9,
    memory_bandwidth=2.039e12,
    link_bandwidth=300e9,
    network_bandwidth=25e9,
    host_bandwidth=32e9,
    host_bytes=250e9,
    host_memory_bandwidth=51.2e9,
)
BANDWIDTH_REACHED = 0.8
"""Share of every peak bandwidth that is assumed to be reached."""

PRESETS = {one.name: one for one in (H100, H200, A100)}


def preset(name: str) -> Hardware:
    """The numbers of a device by name. Raises ConfigError for one that is not known."""
    if name.lower() not in PRESETS:
        raise ConfigError("device", f"{name!r} is not known", f"Choose one of {', '.join(PRESETS)}.")
    return PRESETS[name.lower()]


_BF16_PEAKS = {
    "H100 80GB HBM3": H100.bf16_flops,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": H200.bf16_flops,
    "H200 NVL": 835e12,
    "A100-SXM4-40GB": A100.bf16_flops,
    "A100-SXM4-80GB": A100.bf16_flops,
    "A100-PCIE-40GB": A100.bf16_flops,
    "A100 80GB PCIe": A100.bf16_flops,
}
"""By the driver's whole name: cards, superchips and slices of one kind differ in what follows it, and in speed."""


def bf16_peak(name: str) -> float | None:
    """Peak FLOP/s of dense bf16 products of what a driver calls `name` (`NVIDIA H100 80GB HBM3`); None: not known."""
    return _BF16_PEAKS.get(name.removeprefix("NVIDIA "))
