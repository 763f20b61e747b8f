"""The curves of a run, from its TensorBoard events."""

from pathlib import Path

from emmental.system.errors import UserError

EVENTS = "events.out.tfevents.*"


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """The values of each tag, by update. Raises UserError when the run has no events."""
    if not any(folder.glob(EVENTS)):
        raise UserError(f"{folder} has no TensorBoard events: give the output folder of a training")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}
