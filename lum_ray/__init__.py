"""lum_ray: user-behaviour foundation models (LUMOS, GTS-LUM) from raw events to endpoints, on Ray."""

__version__ = "0.1.0"
