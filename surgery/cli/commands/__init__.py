"""The commands, one a file."""

from .plan import plan
from .pretrain import pretrain
from .recipes import recipes
from .run import run
from .scan import scan
from .verify import verify

COMMANDS = (plan, run, verify, scan, pretrain, recipes)
