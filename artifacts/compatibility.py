"""Whether a fine-tune fits its base, told from the two manifests alone."""

from artifacts.checkpoint import CheckpointManifest
from deltadock.errors import ArchitectureMismatch


def check_same_architecture(base: CheckpointManifest, finetuned: CheckpointManifest) -> None:
    """Refuse a fine-tune whose tensors are not its base's in name and shape.

    Raises:
        ArchitectureMismatch: naming the first tensor, by name, that differs.
    """
    expected, found = base.config["model_type"], finetuned.config["model_type"]
    if expected != found:
        raise ArchitectureMismatch(f"The base is a {expected!r} model, the fine-tune a {found!r}.")
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    tuned_shapes = {tensor.name: tensor.shape for tensor in finetuned.tensors}
    for name in sorted(shapes.keys() | tuned_shapes.keys()):
        if name not in tuned_shapes:
            raise ArchitectureMismatch(f"The fine-tune lacks the base's tensor {name!r}.")
        if name not in shapes:
            raise ArchitectureMismatch(f"The fine-tune's tensor {name!r} is not in the base.")
        if shapes[name] != tuned_shapes[name]:
            raise ArchitectureMismatch(
                f"Tensor {name!r} has shape {list(tuned_shapes[name])} in the fine-tune, but "
                f"{list(shapes[name])} in the base."
            )
