"""Numbers and markers of the original (llava.constants)."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15

LOGDIR = "."

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
DEFAULT_IMAGE_TOKEN = "<image>"  # noqa: S105  a placeholder in a prompt, not a secret
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"  # noqa: S105
DEFAULT_IM_START_TOKEN = "<im_start>"  # noqa: S105
DEFAULT_IM_END_TOKEN = "<im_end>"  # noqa: S105
IMAGE_PLACEHOLDER = "<image-placeholder>"
