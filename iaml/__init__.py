"""The IAML method (arXiv 2603.13363): network, illumination-aware mirror loss, teacher and student.

Nothing here knows of files, networks or clusters: it needs torch and pydantic alone.
"""

from iaml.enhance import enhance
from iaml.illumination import emphasis_map, luminance
from iaml.metrics import score
from iaml.mirror import mirror_loss
from iaml.network import AutoEncoder, NetworkSettings
from iaml.normalization import use_global_batch_norm
from iaml.objective import Objective, ObjectiveSettings
from iaml.precision import Precision, multiplies_bf16_fast
from iaml.settings import Settings
from iaml.teacher_student import TeacherSettings, TeacherStudent

__all__ = [
    "AutoEncoder",
    "NetworkSettings",
    "Objective",
    "ObjectiveSettings",
    "Precision",
    "Settings",
    "TeacherSettings",
    "TeacherStudent",
    "emphasis_map",
    "enhance",
    "luminance",
    "mirror_loss",
    "multiplies_bf16_fast",
    "score",
    "use_global_batch_norm",
]
