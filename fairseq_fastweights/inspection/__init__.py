"""What fast-weight heads write, erase and read: recordings, numbers and pictures.

    fastweights-inspect CHECKPOINT --text "..." --out FOLDER
    python -m fairseq_fastweights.inspection CHECKPOINT --text "..." --out FOLDER

``record`` works on any model with fast-weight attention, ``checkpoint`` on what fairseq saved; ``pictures`` needs
matplotlib.
"""

from .record import Recording, recording

__all__ = ["Recording", "recording"]
