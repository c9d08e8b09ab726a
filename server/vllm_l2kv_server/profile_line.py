"""What an engine takes from a profile, as one line of its start."""

from vllm_l2kv.cli_types import counted, listed
from vllm_l2kv.log import MARK
from vllm_l2kv.profile import Profile
from vllm_l2kv.settings import Settings


def profile_line(settings: Settings) -> str | None:
    """A line on what stays full, how requests are compressed by default, and in what memory; `None` without a profile.

    It begins with `MARK`, so a quiet screen shows it. Options of the user are in the settings, so the line has their
    values where they replace those of the profile.
    """
    if settings.profile is None:
        return None
    shape = Profile.read(settings.profile).shape
    of_layers = shape.num_full(settings.full_layers, {})
    num_full = shape.num_full(settings.full_layers, settings.full_heads)
    full = []
    if settings.full_layers or not settings.full_heads:
        full.append(f"full layers {listed(map(str, settings.full_layers)) or 'none'}")
    if settings.full_heads:
        full.append(f"{counted(num_full - of_layers, 'full head')} of {shape.num_heads}")
    ratio, ranked = settings.defaults.keep_ratio, f"scorer {settings.defaults.scorer}"
    if settings.defaults.granularity != "token":
        ranked += f" and granularity {settings.defaults.granularity}"
    memory = (num_full + (shape.num_heads - num_full) * ratio) / shape.num_heads
    return (
        f"{MARK} With profile {settings.profile}: {', '.join(full)}; by default a request keeps {ratio:.3g} of the "
        f"others by {ranked}, in all {memory:.3g} of the whole cache.\n"
    )
