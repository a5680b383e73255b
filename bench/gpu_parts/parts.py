"""All parts in the order in which they are run: what others are held against first, the dearest last."""

from __future__ import annotations

from rt.bench.gpu_parts.part import Part


def _model(name: str, minutes: float) -> Part:
    return Part(name=name, title=TITLES[name], minutes=minutes, module="models", arguments={"setting": name})


TITLES = {
    "sd15": "SD 1.5, 512 × 512",
    "sd21": "SD 2.1, 768 × 768",
    "sdxl": "SDXL, 1024 × 1024",
    "sdxl-turbo": "SDXL-Turbo, 512 × 512",
}

PARTS = (
    Part(name="ceilings", title="What the machine can do", minutes=0.5, module="ceilings"),
    Part(
        name="kernels",
        title="Kernels",
        minutes=3.5,
        module="kernels",
        dry_environment={"TRITON_INTERPRET": "1"},
    ),
    Part(name="payloads", title="Plugin payloads", minutes=0.5, module="payloads"),
    Part(name="demo", title="The demo model against the CPU", minutes=1.5, module="demo"),
    _model("sd15", 4.0),
    _model("sdxl", 6.0),
    _model("sdxl-turbo", 4.0),
    _model("sd21", 2.5),
    Part(name="ablation", title="What each pass and each graph is worth", minutes=1.5, module="ablation"),
    Part(name="fp8", title="Linear layers in fp8", minutes=0.5, module="fp8"),
)
