"""The commands, one a file."""

from .clean import clean
from .plan import plan
from .pretrain import pretrain
from .run import run
from .scan import scan
from .verify import verify

COMMANDS = (plan, run, verify, scan, pretrain, clean)
