"""What a training may show its user, line by line."""

import re

NUMBER = r"[+-]?\d+(\.\d+)?(e-\d+)?"
TERMS = ["loss", "reconstruction", "ssim", "mirror", "learning_rate", "grad_norm", "ema_rate", "images_per_s"]
MEANT = (
    r"",
    r"no LPIPS: .+",
    r"LPIPS \w+ from .+ \(sha256 \w{64}\)",
    r"Ray [\d.]+ (on this machine|at [\d.]+:\d+)(, dashboard http://[\w.]+:\d+)?",
    r"cache .+: keeps .+ GiB",
    r"\d+ workers? with (a GPU and )?\d+ threads?( each)?; \d+ evaluation actors?( with [\d.]+ of a GPU)? beside \w+",
    r"networks in (bf16|float32)",
    r"node \S+: ranks? [\d, -]+ on (CPU|GPU [\d, -]+)",
    rf"step \d+/\d+  {'  '.join(f'{term} {NUMBER}' for term in TERMS)}  ETA \d+m\d\ds",
    r"checkpoint \S+/checkpoint-\d{8}",
    rf"checkpoint-\d{{8}} scored: dev_student_psnr {NUMBER}",
    r"checkpoint: checkpoint-\d{8}, split: dev, protocol: rgb_u8.*, \d+ images",
    r"method( +[\w ]+)+",
    rf"(input|gamma|student|averaged|  mean of last \d+)( +{NUMBER})+",
    r"report: \S+/report\.html",
    r"dry run passed: data, storage and resources serve; 2 steps ran and were scored",
)


def not_meant(output: str, settings: str) -> list[str]:
    """Lines of a training's output that no user is meant to see; its resolved ``settings`` are."""
    assert settings in output
    lines = output.replace(settings, "").split("\n")
    return [line for line in lines if not any(re.fullmatch(meant, line) for meant in MEANT)]
