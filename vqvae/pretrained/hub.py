"""Image tokenizers by their names on the Hugging Face Hub."""

import re
from pathlib import Path

from vqvae.pretrained.openai_dvae import DECODER_NAME, ENCODER_NAME
from vqvae.serialization import CONFIG_NAME, WEIGHTS_NAME, shown

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# What load_tokenizer reads, at the top of a repository: it may hold much else, in many gigabytes.
FILES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    "diffusion_pytorch_model.safetensors",
    ENCODER_NAME,
    DECODER_NAME,
)


def is_hub_name(name: str | Path) -> bool:
    """Tell whether a text is ``user/name`` of the Hub, and no path on this machine."""
    # With a folder `out` here, a missing `out/vqvae` is a path: a run that is not trained yet.
    return bool(HUB_NAME.fullmatch(str(name))) and not Path(name).parent.exists()


def tokenizer_folder(name: str | Path) -> Path:
    """Return the folder of an image tokenizer; one of the Hub is downloaded into its cache once.

    Raises:
        ValueError: If a name of the Hub is not there, cannot be reached, or has no safetensors.
    """
    if not is_hub_name(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    place = f"{name}: no such folder; taken as a name on the Hub"
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=list(FILES)))
    except RepositoryNotFoundError:
        raise ValueError(
            f"{place}, where there is no such repository, or none without `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{place}, which cannot be reached, and it was not downloaded before; expected a "
            "network without HF_HUB_OFFLINE, or a folder"
        ) from None
    except Exception as error:  # its HTTP library, and so the type, has changed between versions
        raise ValueError(f"{place}, which did not give it: {shown(error, 200)}") from None
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{place}, which holds none of {', '.join(FILES[1:])}; if it publishes a file such as "
            "vq_ds16_t2i.pt, download that and run python scripts/convert_tokenizer.py FILE "
            "--out FOLDER"
        )
    return folder
